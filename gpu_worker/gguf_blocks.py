"""GGUF's quantised blocks, kept: the same small integers and scales in arrays of their own, as the engine holds them.

    <weight>.q4     uint8 (out, in / 2)     Q4_0, Q4_1: input 2j in the low half of byte j, 2j + 1 in the high one
    <weight>.q8     int8 (out, in)          Q8_0
    <weight>.scale  float16 (out, in / 32)  weight = scale * q + min
    <weight>.min    float16 (out, in / 32)  with .q4 only; Q4_0, whose integers are centred, has -8 * scale

Nothing is rounded. Matrices of other kinds are dequantised (gguf_convert.py).
"""

from typing import Any

import gguf
import numpy

Kind = gguf.GGMLQuantizationType
Array = numpy.ndarray[Any, Any]
Arrays = dict[str, Array]  # by suffix

GROUP = 32
NIBBLES_CENTRE = 8


def keep_blocks(data: Array, kind: gguf.GGMLQuantizationType) -> Arrays | None:
    """data: bytes of a matrix, (out, bytes of a row). None if this kind is not kept, or would lose a bit."""
    if data.ndim != 2 or kind not in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
        return None
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(data.shape[0], -1, size)
    if kind == Kind.Q8_0:
        values = blocks[:, :, 2:].view(numpy.int8).reshape(data.shape[0], -1)
        return {"q8": numpy.ascontiguousarray(values), "scale": _halves(blocks, 0)}
    scale = _halves(blocks, 0)
    if kind == Kind.Q4_1:
        return {"q4": _nibbles(blocks[:, :, 4:]), "scale": scale, "min": _halves(blocks, 1)}
    with numpy.errstate(over="ignore"):
        minimum = scale * numpy.float16(-NIBBLES_CENTRE)  # exact, unless it is beyond float16
    if not numpy.isfinite(minimum).all():
        return None
    return {"q4": _nibbles(blocks[:, :, 2:]), "scale": scale, "min": minimum}


def _halves(blocks: Array, index: int) -> Array:
    """(out, groups): the float16 at this place of each block."""
    raw = numpy.ascontiguousarray(blocks[:, :, 2 * index : 2 * index + 2])
    halves: Array = raw.view(numpy.float16)[:, :, 0]
    return numpy.ascontiguousarray(halves)


def _nibbles(packed: Array) -> Array:
    """(out, groups, 16), byte j holding values j and j + 16 -> (out, groups * 16), byte j holding 2j and 2j + 1."""
    values = numpy.concatenate((packed & 15, packed >> 4), axis=2)
    pairs: Array = values[:, :, 0::2] | values[:, :, 1::2] << 4
    return pairs.reshape(pairs.shape[0], -1)
