"""How long running answers wait for their next token while a long prompt comes in; in one process, without bus or HTTP.

    chrt -r 1 python -m benchmarks.engine_stall [--model DIR] [--answers 1,4,16] [--prompts 2000,8000] [--threads 1]

For each number of answers and each length of prompt: the answers run alone for a while, then the prompt arrives.
Printed: the time between two tokens of an answer before and meanwhile, in units of the median before, where 3 is the
promise (its own interval and two more); the prompt's time to first token, and what that is with nobody else there.

On a shared machine look at the answers alone first: whatever their p99 is above 1 is the machine's. The last column
counts only time that the steps' thread had a core: what the engine does, whoever else runs (best with one thread).
"""

import argparse
import dataclasses
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bus.ids import ModelName
from bus.jobs import ChatJob, Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled, assemble
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.prompt import Answer, prepare

ANSWER_PROMPT = 64
ALONE_STEPS = 60  # measured before the prompt comes
PLAIN_TOKENS = (1000, 40_000)  # ordinary words of the default model's vocabulary
NEW_MAX = 4000  # of each answer: more than the prompt takes steps


@dataclasses.dataclass(frozen=True)
class Stall:
    alone_ms: list[float]  # between two tokens of an answer
    beside_ms: list[float]  # the same while the prompt comes in
    alone_cpu_ms: list[float]  # of each step, by the thread's own clock
    beside_cpu_ms: list[float]
    first_ms: float  # the prompt's first token


def measure_stall(engine: Assembled, answers: int, prompt_len: int, chance: random.Random) -> Stall:
    names = [f"answer-{number}" for number in range(answers)]
    for name in names:
        engine.core.add(random_answer(engine, name, ANSWER_PROMPT, NEW_MAX, chance))
    last_s: dict[str, float] = {}
    while len(last_s) < answers:
        step(engine, last_s)
    for _ in range(10):  # the step after the last prompt is not yet an ordinary one
        step(engine, last_s)
    alone: list[float] = []
    alone_cpu = [timed_step(engine, last_s, alone) for _ in range(ALONE_STEPS)]

    prompt = random_answer(engine, "prompt", prompt_len, 1, chance)
    began_s = time.perf_counter()
    engine.core.add(prompt)
    beside: list[float] = []
    beside_cpu: list[float] = []
    while not prompt.sequence.first_token_s:
        beside_cpu.append(timed_step(engine, last_s, beside))
    first_ms = 1000 * (time.perf_counter() - began_s)
    for name in names:
        engine.core.cancel(name)
    while not engine.core.idle:
        engine.core.step()
    return Stall(alone, beside, alone_cpu, beside_cpu, first_ms)


def timed_step(engine: Assembled, last_s: dict[str, float], gaps_ms: list[float]) -> float:
    """Milliseconds that this thread had a core for. gaps_ms: gets what the answers waited."""
    began_s = time.thread_time()
    gaps_ms += step(engine, last_s)
    return 1000 * (time.thread_time() - began_s)


def step(engine: Assembled, last_s: dict[str, float]) -> list[float]:
    """Milliseconds since its last token, of each answer that got one or several."""
    pieces = engine.core.step().pieces
    now_s = time.perf_counter()
    gaps = []
    for piece in pieces:
        if piece.sequence in last_s:
            gaps.append(1000 * (now_s - last_s[piece.sequence]))
        if piece.sequence.startswith("answer"):
            last_s[piece.sequence] = now_s
    return gaps


def first_token_ms(engine: Assembled, prompt_len: int, chance: random.Random) -> float:
    """Of a prompt that nobody runs beside."""
    began_s = time.perf_counter()
    engine.core.add(random_answer(engine, "alone", prompt_len, 1, chance))
    while not engine.core.idle:
        engine.core.step()
    return 1000 * (time.perf_counter() - began_s)


def random_answer(engine: Assembled, name: str, prompt_len: int, new: int, chance: random.Random) -> Answer:
    job = ChatJob(
        model=ModelName("benchmark"), prompt="x", max_tokens=new, sampling=Sampling(temperature=0.0), ignore_eos=True
    )
    answer = prepare(GenerateRequest(name, job, seed=1), engine.text, context_max=engine.context)
    assert isinstance(answer, Answer)
    sequence = answer.sequence
    sequence.tokens = [chance.randrange(*PLAIN_TOKENS) for _ in range(prompt_len)]
    sequence.prompt_len, sequence.total_max = prompt_len, prompt_len + new
    return answer


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def show(answers: int, prompt_len: int, found: Stall, undisturbed_ms: float) -> str:
    usual = statistics.median(found.alone_ms)

    def ratios(values: Sequence[float], unit: float = usual) -> str:
        p50, p99 = percentile(values, 0.5) / unit, percentile(values, 0.99) / unit
        return f"{p50:.2f} / {p99:.2f} / {max(values) / unit:.2f}"

    return (
        f"| {answers} | {prompt_len} | {usual:.1f} | {ratios(found.alone_ms)} | {ratios(found.beside_ms)}"
        f" | {prompt_len / len(found.beside_cpu_ms):.0f} | {found.first_ms / 1000:.2f} / {undisturbed_ms / 1000:.2f}"
        f" | {ratios(found.beside_cpu_ms, statistics.median(found.alone_cpu_ms))} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time between tokens of running answers while a long prompt comes in.")
    parser.add_argument("--model", type=Path, default=Path("var/models/smollm2-135m-instruct"))
    parser.add_argument("--answers", default="1,4,16")
    parser.add_argument("--prompts", default="2000,8000", help="8000: about the whole context of the default model")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    answers = [int(one) for one in options.answers.split(",")]
    prompts = [int(one) for one in options.prompts.split(",")]

    engine = assemble(
        TorchEngineConfig(
            model_dir=options.model,
            capacity=max(answers) + 1,
            dtype=options.dtype,
            threads=options.threads,
            kv_tokens=max(prompts) + 64 + max(answers) * (ANSWER_PROMPT + 1000),
            prefix_cache=False,
        )
    )
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {engine.threads} threads\n")
    print(
        "| answers | prompt | alone: p50 ms | alone: p50 / p99 / max in its p50 | meanwhile: p50 / p99 / max likewise |"
        " prompt tokens a step | first token s: beside them / nobody there | meanwhile, by the thread's clock |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    chance = random.Random(1)
    for prompt_len in prompts:
        undisturbed_ms = first_token_ms(engine, prompt_len, chance)
        for count in answers:
            print(show(count, prompt_len, measure_stall(engine, count, prompt_len, chance), undisturbed_ms), flush=True)


if __name__ == "__main__":
    main()
