"""What the token times of bursts say. Pure.

requests        prompt | answer
   a       |===========|+  +  +  +  +  +  +  +  +  +
   b       |==============|  +  +  +  +  +  +  +  +  +
   c       |=================|  +  +  +  +  +  +  +  +  +
                             ^                       ^
                   all have begun              one has ended: the decode rate is that of the tokens in between
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

Arrivals = Sequence[Sequence[tuple[float, int]]]  # of each request: (seconds since the burst, tokens that came then)


@dataclasses.dataclass(frozen=True)
class Burst:
    """One burst: all its requests arrive together."""

    requests: int
    decode_rate: float | None  # tokens/s while all run; None: at no time did all run
    whole_rate: float  # tokens/s of the whole burst, from its arrival to its last token
    first_p50_ms: float
    first_max_ms: float
    between_p50_ms: float
    between_p99_ms: float
    peak_mib: float  # of all its processes, since they began
    largest_mib: float  # of the largest of them
    load: float  # of the machine (1 minute), just after


@dataclasses.dataclass(frozen=True)
class Figures:
    """The rounds of one contender at one level: medians, and the best decode rate."""

    requests: int
    decode_rate: float | None
    decode_rate_best: float | None
    whole_rate: float  # tokens/s of the whole burst, from its arrival to its last token
    first_p50_ms: float
    first_max_ms: float
    between_p50_ms: float
    between_p99_ms: float
    peak_mib: float
    largest_mib: float


def token_times(arrivals: Arrivals) -> list[list[float]]:
    """Seconds of every token, by request. Raises ValueError if a request got none."""
    times = [[at_s for at_s, tokens in one for _ in range(tokens)] for one in arrivals]
    if not all(times):
        raise ValueError("a request got no token")
    return times


def decode_rate(times: Sequence[Sequence[float]]) -> float | None:
    """Tokens/s from when the last request has its first token until the first has its last."""
    began_s, ended_s = max(one[0] for one in times), min(one[-1] for one in times)
    if ended_s <= began_s:
        return None
    return sum(1 for one in times for at_s in one if began_s < at_s <= ended_s) / (ended_s - began_s)


def measure(arrivals: Arrivals, *, peak_mib: float, largest_mib: float, load: float) -> Burst:
    times = token_times(arrivals)
    first_ms = [1000 * one[0] for one in times]
    # Tokens that come in one piece are waited for once.
    pieces = [[at_s for at_s, tokens in one if tokens] for one in arrivals]
    between_ms = [1000 * (b - a) for one in pieces for a, b in itertools.pairwise(one)] or [0.0]
    return Burst(
        requests=len(times),
        decode_rate=decode_rate(times),
        whole_rate=sum(map(len, times)) / max(one[-1] for one in times),
        first_p50_ms=statistics.median(first_ms),
        first_max_ms=max(first_ms),
        between_p50_ms=percentile(between_ms, 0.5),
        between_p99_ms=percentile(between_ms, 0.99),
        peak_mib=peak_mib,
        largest_mib=largest_mib,
        load=load,
    )


def over_rounds(rounds: Sequence[Burst]) -> Figures:
    rates = [one.decode_rate for one in rounds if one.decode_rate is not None]
    return Figures(
        requests=rounds[0].requests,
        decode_rate=statistics.median(rates) if rates else None,
        decode_rate_best=max(rates, default=None),
        whole_rate=statistics.median(one.whole_rate for one in rounds),
        first_p50_ms=statistics.median(one.first_p50_ms for one in rounds),
        first_max_ms=statistics.median(one.first_max_ms for one in rounds),
        between_p50_ms=statistics.median(one.between_p50_ms for one in rounds),
        between_p99_ms=statistics.median(one.between_p99_ms for one in rounds),
        # Of the first round: a peak only ever grows, so later ones would be those of the largest burst.
        peak_mib=rounds[0].peak_mib,
        largest_mib=rounds[0].largest_mib,
    )


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
