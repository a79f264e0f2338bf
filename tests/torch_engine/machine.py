"""A made-up machine whose steps take what its costs say, with noise: what the engine's estimates are tried on."""

import math
import random
from collections.abc import Sequence

from gpu_worker.torch_engine.rates import Rates
from gpu_worker.torch_engine.step_time import Load, Piece, StepTime, load_of


class Machine:
    """Seconds for a step's start, a token, a chunk, a key read, a (token, key) pair.

    bends: (tokens from which on a further one costs something else, in units of a token's seconds), in rising order.
    """

    def __init__(
        self,
        *costs: float,
        noise: float = 0.03,
        outliers: float = 0.0,
        bends: Sequence[tuple[int, float]] = (),
        seed: int = 0,
    ) -> None:
        self.speed = 1.0
        self._costs = costs
        self._noise = noise
        self._outliers = outliers
        self._bends = bends
        self._chance = random.Random(seed)

    def usual_s(self, load: Load) -> float:
        factors = (1.0, self._rows(load.tokens), load.chunks, load.keys, load.pairs)
        return sum(cost * factor for cost, factor in zip(self._costs, factors, strict=True)) / self.speed

    def _rows(self, tokens: int) -> float:
        bends = [(0, 1.0), *self._bends]
        ends = [low for low, _ in bends[1:]] + [max(tokens, bends[-1][0])]
        return sum(cost * max(0, min(tokens, high) - low) for (low, cost), high in zip(bends, ends, strict=True))

    def takes_s(self, load: Load) -> float:
        late = self._chance.uniform(2, 8) if self._chance.random() < self._outliers else 1.0
        return self.usual_s(load) * late * math.exp(self._chance.gauss(0, self._noise))

    def step(self, known: StepTime, decode: list[Piece], prefill: list[Piece]) -> float:
        load = load_of(decode, prefill)
        seconds = self.takes_s(load)
        known.observe(load, seconds)
        return seconds

    def observed(self, rates: Rates, decode: list[Piece], prefill: list[Piece]) -> float:
        seconds = self.takes_s(load_of(decode, prefill))
        rates.observe(decode=decode, prefill=prefill, seconds=seconds)
        return seconds


CPU = (0.012, 0.0025, 0.003, 1e-6, 2.5e-7)
COMPILED = (0.005, 0.0009, 0.0002, 5e-7, 1e-7)
DEEP = (0.005, 0.0005, 0.0002, 1e-6, 2e-6)  # attention costs more than all else from some hundred keys on
GPU = (0.01, 0.00002, 0.0001, 1e-8, 2e-9)
# Answers alone are replayed from graphs; beside a prompt each operation is launched, whatever its size.
GRAPHS = (0.0006, 0.000003, 0.0025, 1e-8, 2e-9)
LARGE = (0.25, 0.1, 0.0, 1e-6, 1e-6)  # 8 billion parameters on two cores
# The default model on one core of a machine with AVX2: a second row rides along, few more are unpacked for each pass.
BENT = (0.0076, 0.0026, 0.0005, 3.5e-6, 1.05e-6)
BENDS = ((1, 0.7), (2, 1.8), (6, 1.0))


def warmed_up(machine: Machine) -> Rates:
    """What the engine's warm-up lets it see: two prompts, a few tokens each."""
    rates = Rates()
    for prompt in (60, 80):
        machine.observed(rates, [], [(0, prompt)])
        for token in range(5):
            machine.observed(rates, [(prompt + token, 1)], [])
    return rates


def budget(
    rates: Rates, answers: list[Piece], prompts: list[Piece], *, chunk_max: int = 512, settled: int | None = None
) -> int:
    """As many as there are prompts wait; all answers are settled if nothing else is said."""
    return rates.prompt_budget(
        chunk_max=chunk_max,
        answers=answers,
        settled=len(answers) if settled is None else settled,
        prompts=prompts,
        arriving=len(prompts),
    )


def gaps_beside_a_prompt(
    machine: Machine, answers: int, prompt: int, *, slower_at: int | None = None, slower: float = 2.0
) -> list[float]:
    """Steps while a prompt comes in beside running answers, each in units of what it would usually take without it."""
    rates = warmed_up(machine)
    for _ in range(30):
        machine.observed(rates, [(100, 1)] * answers, [])
    done = 0
    gaps: list[float] = []
    while done < prompt:
        if len(gaps) == slower_at:
            machine.speed /= slower
        running = [(130 + len(gaps), 1)] * answers
        tokens = budget(rates, running, [(done, prompt - done)])
        assert 0 <= tokens <= prompt - done
        taken = [(done, tokens)] if tokens else []
        gaps.append(machine.observed(rates, running, taken) / machine.usual_s(load_of(running)))
        done += tokens
    return sorted(gaps)
