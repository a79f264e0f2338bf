"""How long running answers wait for their next token while long prompts come in; in one process, without bus or HTTP.

    chrt -r 1 python -m benchmarks.engine_stall [--model DIR] [--answers 1,4,16] [--prompts 2000,8000] [--threads 1]

For each number of answers and each length of prompt: the answers run alone for a while, then a prompt arrives, and
when it has its first token they run alone again, several times over. Printed: the time between two tokens of an answer
alone and meanwhile, in units of its own interval, where 3 is the promise (its own and two more); the prompt's time to
first token, and what that is with nobody else there.

An answer's own interval grows with its length and changes with whatever else runs on the machine. So it is taken from
the steps without a prompt that are nearest: the engine makes such steps while a prompt comes in, too. What the machine
does to single steps shows in the answers alone: whatever is above 1 there is the machine's.
"""

import argparse
import dataclasses
import platform
import random
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.model_directory import DEFAULT_MODEL, model_directory
from bus.ids import ModelName
from bus.jobs import ChatJob, Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled, assemble_for_good
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.prompt import Answer, prepare

ANSWER_PROMPT = 64
ALONE_STEPS = 60  # measured before a prompt comes, and as many after the last
NEAREST = 5  # steps without a prompt whose median is the answers' own interval
PLAIN_TOKENS = (1000, 40_000)  # ordinary words of the default model's vocabulary
NEW_MAX = 4000  # of each answer: more than the prompts take steps


@dataclasses.dataclass(frozen=True)
class Step:
    gaps_ms: list[float]  # that its answers waited since their last token
    prompt_tokens: int
    beside: bool  # while a prompt was coming in


@dataclasses.dataclass(frozen=True)
class Stall:
    steps: list[Step]
    first_ms: list[float]  # of each prompt, its first token

    def in_intervals(self, *, beside: bool) -> list[float]:
        """Each gap in units of the answers' own interval at that time; while prompts came in, or else."""
        alone = [(at, statistics.median(step.gaps_ms)) for at, step in enumerate(self.steps) if not step.prompt_tokens]
        return [
            gap / own_interval_ms(alone, at)
            for at, step in enumerate(self.steps)
            if step.beside == beside
            for gap in step.gaps_ms
        ]


def own_interval_ms(alone: Sequence[tuple[int, float]], at: int) -> float:
    """alone: (place, milliseconds) of the steps without a prompt."""
    nearest = sorted(alone, key=lambda one: abs(one[0] - at))[:NEAREST]
    return statistics.median(took_ms for _, took_ms in nearest)


def measure_stall(engine: Assembled, answers: int, prompt_len: int, times: int, chance: random.Random) -> Stall:
    names = [f"answer-{number}" for number in range(answers)]
    for name in names:
        engine.core.add(random_answer(engine, name, ANSWER_PROMPT, NEW_MAX, chance))
    last_s: dict[str, float] = {}
    while len(last_s) < answers:
        step(engine, last_s, beside=False)
    steps: list[Step] = []
    first_ms: list[float] = []
    for number in range(times):
        steps += steps_alone(engine, last_s)
        prompt = random_answer(engine, f"prompt-{number}", prompt_len, 1, chance)
        began_s = time.perf_counter()
        engine.core.add(prompt)
        while not prompt.sequence.first_token_s:
            steps.append(step(engine, last_s, beside=True))
        first_ms.append(1000 * (time.perf_counter() - began_s))
    steps += steps_alone(engine, last_s)
    for name in names:
        engine.core.cancel(name)
    while not engine.core.idle:
        engine.core.step()
    return Stall(steps, first_ms)


def steps_alone(engine: Assembled, last_s: dict[str, float]) -> list[Step]:
    for _ in range(10):  # the step after the last prompt is not yet an ordinary one
        step(engine, last_s, beside=False)
    return [step(engine, last_s, beside=False) for _ in range(ALONE_STEPS)]


def step(engine: Assembled, last_s: dict[str, float], *, beside: bool) -> Step:
    report = engine.core.step()
    now_s = time.perf_counter()
    gaps_ms = []
    for piece in report.pieces:
        if piece.sequence in last_s:
            gaps_ms.append(1000 * (now_s - last_s[piece.sequence]))
        if piece.sequence.startswith("answer"):
            last_s[piece.sequence] = now_s
    return Step(gaps_ms, report.prefill_tokens, beside)


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
    def spread(values: Sequence[float]) -> str:
        return f"{percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f} / {max(values):.2f}"

    chunks = [step.prompt_tokens for step in found.steps if step.prompt_tokens]
    cells = (
        answers,
        prompt_len,
        f"{statistics.median(gap for step in found.steps if not step.beside for gap in step.gaps_ms):.1f}",
        spread(found.in_intervals(beside=False)),
        spread(found.in_intervals(beside=True)),
        f"{statistics.mean(chunks):.0f}",
        f"{statistics.median(found.first_ms) / 1000:.2f} / {undisturbed_ms / 1000:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time between tokens of running answers while a long prompt comes in.")
    parser.add_argument("--model", type=model_directory, default=str(DEFAULT_MODEL))
    parser.add_argument("--answers", default="1,4,16")
    parser.add_argument("--prompts", default="2000,8000", help="8000: about the whole context of the default model")
    parser.add_argument("--times", type=int, default=3, help="prompts of each length, one after the other")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    answers = [int(one) for one in options.answers.split(",")]
    prompts = [int(one) for one in options.prompts.split(",")]

    engine = assemble_for_good(
        TorchEngineConfig(
            model_dir=options.model,
            capacity=max(answers) + 1,
            dtype=options.dtype,
            threads=options.threads,
            kv_tokens=max(prompts) + 64 + max(answers) * (ANSWER_PROMPT + NEW_MAX),
            prefix_cache=False,
        )
    )
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {engine.threads} threads\n")
    print(
        "| answers | prompt | interval ms | alone: p50 / p99 / max in intervals | meanwhile: p50 / p99 / max |"
        " prompt tokens a step | first token s: beside them / nobody there |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    chance = random.Random(1)
    for prompt_len in prompts:
        undisturbed_ms = first_token_ms(engine, prompt_len, chance)
        for count in answers:
            found = measure_stall(engine, count, prompt_len, options.times, chance)
            print(show(count, prompt_len, found, undisturbed_ms), flush=True)


if __name__ == "__main__":
    main()
