"""Driver of our engine, in process: its steps called one after the other, no bus, no HTTP, no other thread."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.driver import claim_stdout, parse_options, serve
from bus.ids import ModelName
from bus.jobs import ChatJob, Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled, assemble_for_good
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.prompt import Answer, prepare


def main() -> None:
    pipe, options = claim_stdout(), parse_options()
    start = StartRecord()
    logging.getLogger("gpu_worker").addHandler(start)
    logging.getLogger("gpu_worker").setLevel(logging.INFO)
    began_s = time.perf_counter()
    engine = assemble_for_good(
        TorchEngineConfig(
            model_dir=Path(options.model),
            capacity=options.requests,
            dtype=options.dtype,
            threads=options.threads,
            kv_tokens=options.requests * options.context,
            prefix_cache=False,  # every prompt of a burst is new
        )
    )
    said = start.fields
    ready = {
        "version": f"torch {torch.__version__}",
        "storage": f"{said['linear']}, {said['attention']}, {said['dtype']}",
        "weight_kind": said["linear"],
        "weight_mib": said.get("weight_mib"),
        "kv_itemsize": getattr(torch, said["dtype"]).itemsize,
        "start_s": time.perf_counter() - began_s,
    }
    serve(pipe, ready, burst=lambda prompts, new: burst(engine, prompts, new))


class StartRecord(logging.Handler):
    """What the engine says about itself in its log once it is ready: which storage and which attention run."""

    fields: dict[str, Any]

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "torch engine ready":
            self.fields = vars(record)


def burst(engine: Assembled, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """All at once, then step by step, with the time of every token."""
    came: dict[str, list[tuple[float, int]]] = {}
    began_s = time.perf_counter()
    for number, prompt in enumerate(prompts):
        came[str(number)] = []
        engine.core.add(to_answer(engine, str(number), prompt, new))
    while not engine.core.idle:
        pieces = engine.core.step().pieces
        at_s = time.perf_counter() - began_s
        for piece in pieces:
            came[piece.sequence].append((at_s, len(piece.tokens)))
    return {"arrivals": list(came.values())}


def to_answer(engine: Assembled, name: str, prompt: list[int], new: int) -> Answer:
    """A greedy request of exactly these tokens."""
    job = ChatJob(
        model=ModelName("benchmark"), prompt="x", max_tokens=new, sampling=Sampling(temperature=0.0), ignore_eos=True
    )
    answer = prepare(GenerateRequest(name, job, seed=1), engine.text, context_max=engine.context)
    assert isinstance(answer, Answer)
    sequence = answer.sequence
    sequence.tokens = list(prompt)
    sequence.prompt_len, sequence.total_max = len(prompt), len(prompt) + new
    return answer


if __name__ == "__main__":
    main()
