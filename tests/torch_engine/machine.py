"""A made-up machine whose steps take what its costs say, with noise: what the engine's estimates are tried on."""

import math
import random

from gpu_worker.torch_engine.rates import prompt_budget
from gpu_worker.torch_engine.step_time import Load, Piece, StepTime, load_of


class Machine:
    """Seconds for a step's start, a token, a chunk, a key read, a (token, key) pair; `free` tokens cost nothing."""

    def __init__(self, *costs: float, noise: float = 0.03, outliers: float = 0.0, free: int = 0, seed: int = 0) -> None:
        self.speed = 1.0
        self._costs = costs
        self._noise = noise
        self._outliers = outliers
        self._free = free
        self._chance = random.Random(seed)

    def usual_s(self, load: Load) -> float:
        start, tokens, chunks, keys, pairs = load.factors
        factors = (start, max(0, tokens - self._free), chunks, keys, pairs)
        return sum(cost * factor for cost, factor in zip(self._costs, factors, strict=True)) / self.speed

    def takes_s(self, load: Load) -> float:
        late = self._chance.uniform(2, 8) if self._chance.random() < self._outliers else 1.0
        return self.usual_s(load) * late * math.exp(self._chance.gauss(0, self._noise))

    def step(self, known: StepTime, decode: list[Piece], prefill: list[Piece]) -> float:
        load = load_of(decode, prefill)
        seconds = self.takes_s(load)
        known.observe(load, seconds)
        return seconds


CPU = (0.012, 0.0025, 0.003, 1e-6, 2.5e-7)
COMPILED = (0.005, 0.0009, 0.0002, 5e-7, 1e-7)
DEEP = (0.005, 0.0005, 0.0002, 1e-6, 2e-6)  # attention costs more than all else from some hundred keys on
GPU = (0.01, 0.00002, 0.0001, 1e-8, 2e-9)


def warmed_up(machine: Machine) -> StepTime:
    """What the engine's warm-up lets it see: two prompts, a few tokens each."""
    known = StepTime()
    for prompt in (60, 80):
        machine.step(known, [], [(0, prompt)])
        for token in range(5):
            machine.step(known, [(prompt + token, 1)], [])
    return known


def gaps_beside_a_prompt(
    machine: Machine, known: StepTime, answers: int, prompt: int, *, slower_at: int | None = None
) -> list[float]:
    """Steps while a prompt comes in beside running answers, each in units of what it would usually take without it."""
    for _ in range(30):
        machine.step(known, [(100, 1)] * answers, [])
    done = 0
    gaps: list[float] = []
    while done < prompt:
        if len(gaps) == slower_at:
            machine.speed /= 2
        running = [(130 + len(gaps), 1)] * answers
        tokens = prompt_budget(known, chunk_max=512, answers=running, prompts=[(done, prompt - done)])
        assert 1 <= tokens <= prompt - done
        gaps.append(machine.step(known, running, [(done, tokens)]) / machine.usual_s(load_of(running)))
        done += tokens
    return sorted(gaps)
