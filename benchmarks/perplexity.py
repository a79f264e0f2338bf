"""Perplexity of a fixed text, one line for each form in which weights are held: what speed costs in quality.

    .venv/bin/python -m benchmarks.perplexity                    the default model: 4-bit, float16 and bfloat16 weights
    .venv/bin/python -m benchmarks.perplexity --rows 1 4 128     one and four rows a step too: other paths may run

The text (perplexity.txt, our own, about 1,900 tokens of the default model: a story, facts, Python, questions, a letter)
is cut into windows. Each is computed alone from its first token, teacher-forced, and all its tokens but the first are
scored: exp of the mean negative log likelihood.
"""

import argparse
import math
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any

import torch

from bus.settings import Settings
from gpu_worker.engine import EngineStartError
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.assembly import assemble
from gpu_worker.torch_engine.batch import build_batch
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.model import Model
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence

TEXT = Path(__file__).with_name("perplexity.txt")
FORMS: dict[str, tuple[dict[str, Any], str]] = {  # how the engine is told, and what it then holds
    "compiled": ({"kernels": "compiled", "dtype": "float32"}, "as in the file, float32 arithmetic"),
    "float32": ({"kernels": "torch", "dtype": "float32"}, "float16, float32 arithmetic"),
    "bfloat16": ({"kernels": "torch", "dtype": "bfloat16"}, "bfloat16"),
}
WINDOW = 512  # tokens that are computed together at most
ROWS = 128  # tokens of one step


@torch.inference_mode()
def perplexity(
    model: Model, blocks: list[int], tokens: Tokens[int], *, window: int = WINDOW, rows: int = ROWS
) -> float:
    """blocks: owned by nobody else, room for `window` tokens at least. rows: tokens of one step."""
    assert len(tokens) > 1 and len(blocks) * model.block_tokens >= min(window, len(tokens))
    loss = 0.0
    scored = 0
    for start in range(0, len(tokens) - 1, window):
        part = list(tokens[start : start + window])
        loss += _loss(model, blocks, part, rows)
        scored += len(part) - 1
    return math.exp(loss / scored)


def _loss(model: Model, blocks: list[int], tokens: list[int], rows: int) -> float:
    """Sum of the negative log likelihoods of all tokens but the first."""
    sequence = Sequence("text", tokens, len(tokens), 0, len(tokens), SamplingChoice(0.0, 1.0, 0, 0))
    sequence.blocks = blocks
    loss = 0.0
    for start in range(0, len(tokens), rows):
        chunk, following = tokens[start : start + rows], tokens[start + 1 : start + 1 + rows]
        plan = Plan(prefill=(Work(sequence, start, tuple(chunk), sampled=0),))
        hidden = model.forward(build_batch(plan, block_tokens=model.block_tokens))
        if following:
            likelihoods = torch.log_softmax(model.logits(hidden)[: len(following)].double(), -1)
            expected = torch.tensor(following, device=likelihoods.device)
            loss -= float(likelihoods.gather(1, expected[:, None]).sum())
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--rows", nargs="+", type=int, default=[ROWS], help="tokens of one step")
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--model", default="", help="directory or GGUF file; empty: the default model")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    try:
        directory = resolve_model(Settings(model_path=arguments.model))
    except EngineStartError as error:
        parser.error(str(error))
    print(f"{'form':34} {'rows':>5} {'perplexity':>11}")
    for form in arguments.forms:
        for rows in arguments.rows:
            value = measure(directory, form, rows=rows, window=arguments.window, threads=arguments.threads)
            print(f"{FORMS[form][1]:34} {rows:5} {value:11.3f}", flush=True)


def measure(directory: Path, form: str, *, rows: int = ROWS, window: int = WINDOW, threads: int | None = None) -> float:
    """The text's perplexity with weights in this form (a key of FORMS). Loads the model anew: seconds."""
    choice, _ = FORMS[form]
    config = TorchEngineConfig(model_dir=directory, threads=threads, warm_up=False, kv_tokens=2 * window, **choice)
    engine = assemble(config)
    tokens = engine.text.encode(TEXT.read_text(encoding="utf-8"), special=False)
    pool = engine.core.scheduler.pool
    return perplexity(engine.model, pool.take(pool.blocks_for(window)), tokens, window=window, rows=rows)


if __name__ == "__main__":
    main()
