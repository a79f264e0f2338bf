"""How fast the torch engine is, in this process, without bus or HTTP.

    python -m benchmarks.engine [--model DIR] [--levels 1,4,8,16,32] [--dtype auto] [--threads 2]

For each level: that many requests of random tokens arrive together, `--prompt` tokens long, and answer `--new` tokens.
Printed: decode tokens/s while all of them run, time to first token, time between tokens, and memory, beside what this
machine can do at all (memory bandwidth and float32 products, measured in the same run).
"""

import argparse
import dataclasses
import itertools
import platform
import random
import resource
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

LONG_PROMPT = 2000
PLAIN_TOKENS = (1000, 40_000)  # ordinary words of the default model's vocabulary


@dataclasses.dataclass(frozen=True)
class Figures:
    level: int
    decode_rate: float  # tokens/s while all run
    first_ms: list[float]
    between_ms: list[float]


def measure(engine: Assembled, level: int, prompt_len: int, new: int, chance: random.Random) -> Figures:
    """One burst of `level` requests, step by step, with the time of every token."""
    came: dict[str, list[float]] = {}
    began_s = time.perf_counter()
    for number in range(level):
        name = f"{level}-{number}"
        came[name] = []
        engine.core.add(random_answer(engine, name, prompt_len, new, chance))
    while not engine.core.idle:
        pieces = engine.core.step().pieces
        now_s = time.perf_counter()
        for piece in pieces:
            came[piece.sequence] += [now_s] * len(piece.tokens)
    all_run_s = max(times[0] for times in came.values())
    one_ended_s = min(times[-1] for times in came.values())
    together = sum(1 for times in came.values() for at in times if all_run_s < at <= one_ended_s)
    return Figures(
        level,
        together / max(one_ended_s - all_run_s, 1e-9),
        [1000 * (times[0] - began_s) for times in came.values()],
        [1000 * (b - a) for times in came.values() for a, b in itertools.pairwise(times)],
    )


def measure_stall(
    engine: Assembled, running: int, prompt_len: int, chance: random.Random
) -> tuple[float, float, float]:
    """Time between tokens of running answers, ms: median alone; median and longest while a long prompt comes."""
    for number in range(running):
        engine.core.add(random_answer(engine, f"running-{number}", 32, 400, chance))
    alone = [step_ms(engine) for _ in range(30)][10:]
    long = random_answer(engine, "long", prompt_len, 1, chance)
    engine.core.add(long)
    beside = []
    while not long.sequence.first_token_s:
        beside.append(step_ms(engine))
    for number in range(running):
        engine.core.cancel(f"running-{number}")
    return statistics.median(alone), statistics.median(beside), max(beside)


def step_ms(engine: Assembled) -> float:
    began_s = time.perf_counter()
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


def memory_bandwidth() -> float:
    """Bytes/s of reading and writing a large array, the best of a few."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(5, lambda: target.copy_(source))


def product_rate() -> float:
    """float32 operations/s of a large matrix product, the best of a few."""
    matrix = torch.randn(1024, 1024)
    return float(2 * 1024**3 / best_of(5, lambda: matrix @ matrix))


def best_of(times: int, action: object) -> float:
    assert callable(action)
    taken = []
    for _ in range(times):
        began_s = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode rate, time to first token and memory of the torch engine.")
    parser.add_argument("--model", type=Path, default=Path("var/models/smollm2-135m-instruct"))
    parser.add_argument("--levels", default="1,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    levels = [int(level) for level in options.levels.split(",")]

    began_s = time.perf_counter()
    engine = assemble(
        TorchEngineConfig(
            model_dir=options.model,
            capacity=max(levels),
            dtype=options.dtype,
            threads=options.threads,
            kv_tokens=max(max(levels) * (options.prompt + options.new + 64), LONG_PROMPT + 4 * 512),
            prefix_cache=False,
        )
    )
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {engine.threads} threads")
    print(f"load and warm-up {time.perf_counter() - began_s:.1f} s")
    print(f"prompt {options.prompt}, new {options.new} tokens; all requests of a level arrive together\n")
    print("| requests | decode tokens/s | first token p50 / max ms | between tokens p50 / p99 ms | memory MiB |")
    print("|---:|---:|---:|---:|---:|")
    chance = random.Random(1)
    for level in levels:
        found = measure(engine, level, options.prompt, options.new, chance)
        first = f"{statistics.median(found.first_ms):.0f} / {max(found.first_ms):.0f}"
        between = f"{percentile(found.between_ms, 0.5):.1f} / {percentile(found.between_ms, 0.99):.1f}"
        print(f"| {level} | {found.decode_rate:.1f} | {first} | {between} | {peak_memory_mib():.0f} |", flush=True)
    alone, beside, longest = measure_stall(engine, 4, LONG_PROMPT, chance)
    print(
        f"\n4 running answers, ms between tokens: {alone:.1f} alone;"
        f" {beside:.1f} (longest {longest:.1f}) while a prompt of {LONG_PROMPT} tokens comes in"
    )
    # Last, because its arrays would count as the engine's memory.
    print(f"\nroof: copy {memory_bandwidth() / 1e9:.1f} GB/s, float32 product {product_rate() / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
