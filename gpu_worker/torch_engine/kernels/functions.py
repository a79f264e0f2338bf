"""Functions of vectors: exponential, SiLU, sums over lanes. Their order is fixed, so their bits are too."""

from typing import Any

import numpy

from gpu_worker.torch_engine.kernels.vectors import (
    add,
    compiled,
    div,
    fma,
    lane,
    largest,
    mul,
    nearest,
    power_of_two,
    splat,
    sub,
    where_above,
)

_LEAST, _MOST = numpy.float32(-87.3), numpy.float32(88.0)  # beyond, the result is no normal float32
_LOG2_E = numpy.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = numpy.float32(0.693359375), numpy.float32(-2.12194440e-4)  # together ln 2, for an exact remainder
_ZERO, _ONE, _HALF = numpy.float32(0.0), numpy.float32(1.0), numpy.float32(0.5)
# Cephes' polynomial for exp on [-ln 2 / 2, ln 2 / 2]: relative error below 2^-23.
_C1, _C2, _C3 = numpy.float32(1.9875691500e-4), numpy.float32(1.3981999507e-3), numpy.float32(8.3334519073e-3)
_C4, _C5 = numpy.float32(4.1665795894e-2), numpy.float32(1.6666665459e-1)


@compiled
def exponential(x: Any) -> Any:
    """e^x; 0 where x is below -87.3, also for minus infinity; e^88 above 88; 0 for NaN."""
    held = sub(splat(_ZERO), largest(sub(splat(_ZERO), largest(x, splat(_LEAST))), splat(-_MOST)))
    whole = nearest(mul(held, splat(_LOG2_E)))
    rest = fma(whole, splat(-_LN2_HIGH), held)
    rest = fma(whole, splat(-_LN2_LOW), rest)
    series = fma(splat(_C1), rest, splat(_C2))
    series = fma(series, rest, splat(_C3))
    series = fma(series, rest, splat(_C4))
    series = fma(series, rest, splat(_C5))
    series = fma(series, rest, splat(_HALF))
    series = add(fma(series, mul(rest, rest), rest), splat(_ONE))
    return where_above(x, splat(_LEAST), mul(series, power_of_two(whole)))


@compiled
def silu(x: Any) -> Any:
    """x / (1 + e^-x)."""
    return div(x, add(splat(_ONE), exponential(sub(splat(_ZERO), x))))


@compiled
def total(x: Any) -> Any:
    """The sum of the eight, by halves."""
    four_0, four_1 = lane(x, 0) + lane(x, 4), lane(x, 1) + lane(x, 5)
    four_2, four_3 = lane(x, 2) + lane(x, 6), lane(x, 3) + lane(x, 7)
    return (four_0 + four_2) + (four_1 + four_3)


@compiled
def maximum(x: Any) -> Any:
    found = lane(x, 0)
    for index in range(1, 8):
        found = max(found, lane(x, index))
    return found
