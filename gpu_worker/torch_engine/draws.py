"""Random numbers that depend on (seed, position) alone.

A sequence resumed on another engine draws the same number at the same position, whatever ran beside it before.
"""

MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A float in [0, 1): 53 bits of SplitMix64 (Steele, Lea and Flood, 2014), used as a counter-based mix."""
    return (_mix(_mix(seed & MASK) ^ (position & MASK)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
