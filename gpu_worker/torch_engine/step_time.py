"""How long a step takes, learned from the steps that were. Pure: no clock, no tensors.

    seconds = start + rows(tokens) + chunk * chunks + read * keys read + score * (token, key) pairs

A further row costs little while reading the weights costs more than computing with them, and from some number of rows
on it costs what its arithmetic does; kernels change their ways in between. So `rows` is a line with bends at the powers
of two, whose slopes are costs like the others; what is learned of one slope says something about those beside it.

The costs differ by orders of magnitude between machines, models and kernels, and all of them change together when
a neighbour takes a core. So what is estimated is their *logarithms*, by an extended Kalman filter: a cost is never
negative, no unit and no constant of any machine is built in, and a step that says nothing about a cost (there was no
prompt in it) still moves it with the others, because the uncertainty that grows between steps is mostly that of the
common speed. One late step is no news and is held to a bounded weight; several in a row are a new speed, and are
believed at once. How far an expectation may be wrong is known too: who has seen little can be careful.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy

Piece = tuple[int, int]  # (start, count): tokens of one sequence that a step computes, behind `start` computed ones
Vector = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

BENDS = (1, 2, 4, 8, 16, 32, 64)  # tokens of a step from which on a further one may cost another amount

# Costs before the first step, relative to each other, and how wrong each may well be (standard deviation of its log).
START, CHUNK, READ, SCORE = (1.0, 1.0), (0.1, 1.5), (3e-5, 2.0), (3e-5, 2.0)
ROW = (0.05, 1.5)
ROW_APART, ROW_NEXT = 0.7, 0.5  # how far the rows' slopes lie apart on top, and what two neighbours share of that
SPEED_UNKNOWN = 10.0  # of the log of all together: nothing is known of the machine
SPEED_DRIFT, COST_DRIFT = 0.01, 0.005  # growth of these per step: speeds change, costs relative to each other hardly
NOISE_LEAST, NOISE_FIRST, NOISE_MOST = 0.02, 0.1, 0.5  # of one step's log time around what was expected
NOISE_WEIGHT = 0.03
OUTLIER = 3.0  # standard deviations beyond which a step counts no more than one at this distance
SURPRISES_MAX = 3  # outliers on the same side in a row: the speed has changed
MOVE_MAX = 1.0  # of a cost's log in one step: the filter is linear only nearby


_ENDS = (*BENDS[1:], math.inf)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step computes, as far as its time depends on it."""

    tokens: int = 0
    chunks: int = 0  # pieces of prompts of more than one token; pieces of one are computed together
    keys: int = 0  # that the pieces look at, each piece's counted once
    pairs: float = 0.0  # of a token and a key that it looks at

    @property
    def factors(self) -> Vector:
        """One factor for each cost: start, rows between two bends, chunks, keys, pairs."""
        rows = [float(min(max(self.tokens - low, 0), high - low)) for low, high in zip(BENDS, _ENDS, strict=True)]
        return numpy.array([1.0, *rows, self.chunks, self.keys, self.pairs])


def load_of(decode: Iterable[Piece], prefill: Iterable[Piece] = ()) -> Load:
    pieces = list(prefill)
    chunks = sum(count > 1 for _, count in pieces)
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
        self.changes = 0  # of the machine's speed
        priors = (START, *[ROW for _ in BENDS], CHUNK, READ, SCORE)
        self._costs = numpy.log([cost for cost, _ in priors])
        self._covariance = _prior_covariance([doubt for _, doubt in priors])
        self._most = self._covariance.diagonal().copy()
        self._surprises = 0  # outliers in a row; negative: faster ones

    def expected_s(self, load: Load) -> float:
        """Seconds; meaningless before the first step."""
        return float(self._parts(load).sum())

    def doubt(self, load: Load, than: Load | None = None) -> float:
        """How wrong `expected_s` may be, standard deviation of its log; `noise` of the step itself comes on top.

        than: of how many times longer it takes than that; the machine's speed does not matter then.
        """
        shares = _shares(self._parts(load))
        if than is not None:
            shares -= _shares(self._parts(than))
        return math.sqrt(max(0.0, float(shares @ self._covariance @ shares)))

    def observe(self, load: Load, seconds: float) -> float:
        """Learn from a step. Returns the seconds that are believed: of a late one no more than its bounded weight."""
        if not 0.0 < seconds < math.inf:
            return self.expected_s(load)
        self._drift()
        parts = self._parts(load)
        shares = _shares(parts)  # the derivative of the log of the sum
        expected_s = float(parts.sum())
        missed = math.log(seconds / expected_s)
        toward = self._covariance @ shares
        unknown = float(shares @ toward)
        if self._is_new_speed(missed, math.sqrt(unknown + self.noise**2)):
            self._surprises = 0
            self.changes += 1
            self._covariance += missed**2
            toward = self._covariance @ shares
            unknown = float(shares @ toward)
        variance = unknown + self.noise**2
        reach = OUTLIER * math.sqrt(variance)
        believed = max(-reach, min(reach, missed))
        move = toward * (believed / variance)
        self._costs += move.clip(-MOVE_MAX, MOVE_MAX) if self.steps else move
        self._covariance -= numpy.outer(toward, toward) / variance
        self._learn_noise(believed, unknown)
        self.steps += 1
        return expected_s * math.exp(believed)

    def _parts(self, load: Load) -> Vector:
        return numpy.exp(self._costs) * load.factors

    def _drift(self) -> None:
        """Between two steps everything may have become slower or faster, and each cost a little."""
        self._covariance += SPEED_DRIFT**2
        own = self._covariance.diagonal()
        numpy.fill_diagonal(self._covariance, numpy.minimum(own + COST_DRIFT**2, self._most))

    def _is_new_speed(self, missed: float, deviation: float) -> bool:
        if abs(missed) <= OUTLIER * deviation:
            self._surprises = 0
            return False
        same_side = self._surprises * missed >= 0
        self._surprises = (self._surprises if same_side else 0) + (1 if missed > 0 else -1)
        return abs(self._surprises) >= SURPRISES_MAX

    def _learn_noise(self, missed: float, unknown: float) -> None:
        """What is missed is partly ignorance; only the rest is noise."""
        square = max(missed**2 - unknown, 0.0)
        variance = self.noise**2 + NOISE_WEIGHT * (square - self.noise**2)
        self.noise = min(NOISE_MOST, max(NOISE_LEAST, math.sqrt(variance)))


def _prior_covariance(doubts: list[float]) -> Vector:
    """Of the costs' logs. All share the machine's speed, the rows' slopes what a row costs, and neighbours more."""
    places = numpy.arange(len(doubts))
    rows = (places >= 1) & (places <= len(BENDS))
    apart = abs(places[:, None] - places)
    own = numpy.diag(numpy.square(doubts))
    shared = ROW[1] ** 2 + ROW_APART**2 * ROW_NEXT**apart
    relative: Vector = numpy.where(rows[:, None] & rows, shared, own)
    return relative + SPEED_UNKNOWN**2


def _shares(parts: Vector) -> Vector:
    return parts / float(parts.sum())
