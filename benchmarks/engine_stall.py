"""How long running answers wait for their next token while a long prompt comes in; in one process, without bus or HTTP.

    chrt -r 1 python -m benchmarks.engine_stall [--model DIR] [--answers 1,4,16] [--prompts 2000,8000] [--threads 1]

For each number of answers and each length of prompt: the answers run alone for a while, then the prompt arrives, and
when it has its first token they run alone again. Printed: the time between two tokens of an answer alone and
meanwhile, in units of its own interval, where 3 is the promise (its own and two more); the prompt's time to first
token, and what that is with nobody else there. An answer's own interval grows with its length: it goes from the median
before to the median afterwards, step by step.

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
ALONE_STEPS = 60  # measured before the prompt comes, and as many afterwards
PLAIN_TOKENS = (1000, 40_000)  # ordinary words of the default model's vocabulary
NEW_MAX = 4000  # of each answer: more than the prompt takes steps


@dataclasses.dataclass(frozen=True)
class Steps:
    """Some steps in a row: of each the milliseconds that its answers waited, and what it took by its thread's clock."""

    gaps_ms: list[list[float]]
    cpu_ms: list[float]

    def usual_ms(self) -> float:
        return statistics.median(gap for gaps in self.gaps_ms for gap in gaps)

    def usual_cpu_ms(self) -> float:
        return statistics.median(self.cpu_ms)


@dataclasses.dataclass(frozen=True)
class Stall:
    before: Steps
    beside: Steps  # while the prompt comes in
    after: Steps
    first_ms: float  # the prompt's first token

    def in_intervals(self) -> list[float]:
        """Each gap while the prompt came in, in units of the answers' own interval at that time."""
        units = between(self.before.usual_ms(), self.after.usual_ms(), len(self.beside.gaps_ms))
        return [gap / unit for gaps, unit in zip(self.beside.gaps_ms, units, strict=True) for gap in gaps]

    def in_cpu_intervals(self) -> list[float]:
        units = between(self.before.usual_cpu_ms(), self.after.usual_cpu_ms(), len(self.beside.cpu_ms))
        return [cpu / unit for cpu, unit in zip(self.beside.cpu_ms, units, strict=True)]


def between(first: float, last: float, count: int) -> list[float]:
    """`count` values from one to the other."""
    return [first + (last - first) * (place + 0.5) / count for place in range(count)]


def measure_stall(engine: Assembled, answers: int, prompt_len: int, chance: random.Random) -> Stall:
    names = [f"answer-{number}" for number in range(answers)]
    for name in names:
        engine.core.add(random_answer(engine, name, ANSWER_PROMPT, NEW_MAX, chance))
    last_s: dict[str, float] = {}
    while len(last_s) < answers:
        step(engine, last_s)
    before = steps_alone(engine, last_s)

    prompt = random_answer(engine, "prompt", prompt_len, 1, chance)
    began_s = time.perf_counter()
    engine.core.add(prompt)
    beside = Steps([], [])
    while not prompt.sequence.first_token_s:
        timed_step(engine, last_s, beside)
    first_ms = 1000 * (time.perf_counter() - began_s)
    after = steps_alone(engine, last_s)
    for name in names:
        engine.core.cancel(name)
    while not engine.core.idle:
        engine.core.step()
    return Stall(before, beside, after, first_ms)


def steps_alone(engine: Assembled, last_s: dict[str, float]) -> Steps:
    for _ in range(10):  # the step after the last prompt is not yet an ordinary one
        step(engine, last_s)
    steps = Steps([], [])
    for _ in range(ALONE_STEPS):
        timed_step(engine, last_s, steps)
    return steps


def timed_step(engine: Assembled, last_s: dict[str, float], steps: Steps) -> None:
    """One more of `steps`."""
    began_s = time.thread_time()
    steps.gaps_ms.append(step(engine, last_s))
    steps.cpu_ms.append(1000 * (time.thread_time() - began_s))


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
    before_ms, after_ms = found.before.usual_ms(), found.after.usual_ms()
    alone = [gap / before_ms for gaps in found.before.gaps_ms for gap in gaps]
    alone += [gap / after_ms for gaps in found.after.gaps_ms for gap in gaps]

    def spread(values: Sequence[float]) -> str:
        return f"{percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f} / {max(values):.2f}"

    cells = (
        answers,
        prompt_len,
        f"{before_ms:.1f} / {after_ms:.1f}",
        spread(alone),
        spread(found.in_intervals()),
        f"{prompt_len / len(found.beside.cpu_ms):.0f}",
        f"{found.first_ms / 1000:.2f} / {undisturbed_ms / 1000:.2f}",
        spread(found.in_cpu_intervals()),
    )
    return f"| {' | '.join(map(str, cells))} |"


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
            kv_tokens=max(prompts) + 64 + max(answers) * (ANSWER_PROMPT + 1200),
            prefix_cache=False,
        )
    )
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {engine.threads} threads\n")
    print(
        "| answers | prompt | interval ms: before / afterwards | alone: p50 / p99 / max in intervals |"
        " meanwhile: p50 / p99 / max | prompt tokens a step | first token s: beside them / nobody there |"
        " meanwhile, by the thread's clock |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    chance = random.Random(1)
    for prompt_len in prompts:
        undisturbed_ms = first_token_ms(engine, prompt_len, chance)
        for count in answers:
            print(show(count, prompt_len, measure_stall(engine, count, prompt_len, chance), undisturbed_ms), flush=True)


if __name__ == "__main__":
    main()
