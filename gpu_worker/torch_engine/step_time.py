"""How long a step takes, learned from the steps that were. Pure: no clock, no tensors.

    seconds = start + token * tokens + chunk * chunks + read * keys read + score * (token, key) pairs

The five costs differ by orders of magnitude between machines, models and kernels, and all of them change together when
a neighbour takes a core. So what is estimated is their *logarithms*, by an extended Kalman filter: a cost is never
negative, no unit and no constant of any machine is built in, and a step that says nothing about a cost (there was no
prompt in it) still moves it with the others, because the uncertainty that grows between steps is mostly that of the
common speed. One late step is no news and is held to a bounded weight; several in a row are a new speed, and are
believed at once. How far an expectation may be wrong is known too: who has seen little can be careful.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

Piece = tuple[int, int]  # (start, count): tokens of one sequence that a step computes, behind `start` computed ones

# Costs before the first step, relative to each other, and how wrong each may well be (standard deviation of its log).
PRIOR = ((1.0, 1.0), (0.05, 1.5), (0.1, 1.5), (3e-5, 2.0), (3e-5, 2.0))
SPEED_UNKNOWN = 10.0  # of the log of all together: nothing is known of the machine
SPEED_DRIFT, COST_DRIFT = 0.01, 0.005  # growth of these per step: speeds change, costs relative to each other hardly
NOISE_LEAST, NOISE_FIRST, NOISE_MOST = 0.02, 0.1, 0.5  # of one step's log time around what was expected
NOISE_WEIGHT = 0.03
OUTLIER = 3.0  # standard deviations beyond which a step counts no more than one at this distance
SURPRISES_MAX = 3  # outliers on the same side in a row: the speed has changed
MOVE_MAX = 1.0  # of a cost's log in one step: the filter is linear only nearby


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step computes, as far as its time depends on it."""

    tokens: int = 0
    chunks: int = 0  # pieces of prompts; decode pieces are computed together
    keys: int = 0  # that the pieces look at, each piece's counted once
    pairs: float = 0.0  # of a token and a key that it looks at

    @property
    def factors(self) -> tuple[float, float, float, float, float]:
        """One factor for each cost."""
        return 1.0, self.tokens, self.chunks, self.keys, self.pairs


def load_of(decode: Iterable[Piece], prefill: Iterable[Piece] = ()) -> Load:
    pieces = list(prefill)
    chunks = len(pieces)
    pieces += decode
    return Load(
        tokens=sum(count for _, count in pieces),
        chunks=chunks,
        keys=sum(start + count for start, count in pieces),
        pairs=sum(count * (start + (count + 1) / 2) for start, count in pieces),
    )


class StepTime:
    def __init__(self) -> None:
        self.noise = NOISE_FIRST  # of one step, standard deviation of the log
        self.steps = 0
        self._costs = [math.log(cost) for cost, _ in PRIOR]  # natural logarithms
        places = range(len(PRIOR))
        self._covariance = [[SPEED_UNKNOWN**2 + (PRIOR[i][1] ** 2 if i == j else 0.0) for j in places] for i in places]
        self._surprises = 0  # outliers in a row; negative: faster ones

    def expected_s(self, load: Load) -> float:
        """Seconds; meaningless before the first step."""
        return math.fsum(self._parts(load))

    def doubt(self, load: Load) -> float:
        """How wrong `expected_s` may be, standard deviation of its log; `noise` of the step itself comes on top."""
        shares = _shares(self._parts(load))
        return math.sqrt(max(0.0, _dot(shares, self._times(shares))))

    def observe(self, load: Load, seconds: float) -> None:
        if not 0.0 < seconds < math.inf:
            return
        self._drift()
        parts = self._parts(load)
        shares = _shares(parts)  # the derivative of the log of the sum
        missed = math.log(seconds / math.fsum(parts))
        toward = self._times(shares)
        unknown = _dot(shares, toward)
        if self._is_new_speed(missed, math.sqrt(unknown + self.noise**2)):
            self._doubt_speed(missed)
            toward = self._times(shares)
            unknown = _dot(shares, toward)
        reach = OUTLIER * math.sqrt(unknown + self.noise**2)
        believed = max(-reach, min(reach, missed))
        self._move(toward, believed / (unknown + self.noise**2), unknown + self.noise**2)
        self._learn_noise(believed, unknown)
        self.steps += 1

    def _parts(self, load: Load) -> list[float]:
        return [math.exp(cost) * factor for cost, factor in zip(self._costs, load.factors, strict=True)]

    def _times(self, vector: Sequence[float]) -> list[float]:
        return [_dot(row, vector) for row in self._covariance]

    def _drift(self) -> None:
        """Between two steps everything may have become slower or faster, and each cost a little."""
        for i, row in enumerate(self._covariance):
            for j in range(len(row)):
                row[j] += SPEED_DRIFT**2
            row[i] = min(row[i] + COST_DRIFT**2, SPEED_UNKNOWN**2 + PRIOR[i][1] ** 2)

    def _is_new_speed(self, missed: float, deviation: float) -> bool:
        if abs(missed) <= OUTLIER * deviation:
            self._surprises = 0
            return False
        same_side = self._surprises * missed >= 0
        self._surprises = (self._surprises if same_side else 0) + (1 if missed > 0 else -1)
        return abs(self._surprises) >= SURPRISES_MAX

    def _doubt_speed(self, missed: float) -> None:
        self._surprises = 0
        for row in self._covariance:
            for j in range(len(row)):
                row[j] += missed**2

    def _move(self, toward: Sequence[float], by: float, variance: float) -> None:
        for i, gain in enumerate(toward):
            self._costs[i] += max(-MOVE_MAX, min(MOVE_MAX, gain * by)) if self.steps else gain * by
        for i, row in enumerate(self._covariance):
            for j in range(len(row)):
                row[j] -= toward[i] * toward[j] / variance

    def _learn_noise(self, missed: float, unknown: float) -> None:
        """What is missed is partly ignorance; only the rest is noise."""
        square = max(missed**2 - unknown, 0.0)
        variance = self.noise**2 + NOISE_WEIGHT * (square - self.noise**2)
        self.noise = min(NOISE_MOST, max(NOISE_LEAST, math.sqrt(variance)))


def _shares(parts: Sequence[float]) -> list[float]:
    total = math.fsum(parts)
    return [part / total for part in parts]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
