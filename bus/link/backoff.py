"""How long to wait before the next attempt to connect."""

from collections.abc import Callable

FIRST_S = 0.05
LONGEST_S = 2.0


def backoff_s(failures: int, random: Callable[[], float]) -> float:
    """Exponential with full jitter: uniform in [0, min(2 s, 50 ms x 2^failures)), but never a hot loop.

    random: uniform in [0, 1). Source: "Exponential Backoff And Jitter" (Brooker, 2015).
    """
    ceiling = min(LONGEST_S, FIRST_S * 2.0 ** min(failures, 16))
    return max(FIRST_S / 5, ceiling * random())
