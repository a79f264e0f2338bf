"""From weights as they are stored to what the kernels read (weights.py): each piece goes straight to its place."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from gpu_worker.torch_engine.kernels.weights import (
    BFLOAT,
    BLOCK,
    BYTES,
    FLOAT,
    HALF,
    NIBBLES,
    PANEL,
    PackedWeight,
)
from gpu_worker.torch_engine.quantized import Quantized, Weight
from gpu_worker.torch_engine.stored import alike, dense, pieces, smallest_dtype

FORMS = {torch.float16: HALF, torch.bfloat16: BFLOAT, torch.float32: FLOAT}

# A block of each form, as weights.py has it. Outputs lie side by side; floats are moved as integers of their width.
BLOCKS = {
    NIBBLES: numpy.dtype(
        [("scale", "f2", (1, PANEL)), ("minimum", "f2", (1, PANEL)), ("values", "u1", (BLOCK // 2, PANEL))]
    ),
    BYTES: numpy.dtype([("scale", "f2", (1, PANEL)), ("values", "i1", (BLOCK, PANEL))]),
    HALF: numpy.dtype([("values", "i2", (BLOCK, PANEL))]),
    BFLOAT: numpy.dtype([("values", "i2", (BLOCK, PANEL))]),
    FLOAT: numpy.dtype([("values", "i4", (BLOCK, PANEL))]),
}

Array = numpy.ndarray[Any, Any]


class PackedFactory:
    """Weights for the kernels, as the loader asks for them."""

    device = torch.device("cpu")
    dtype = torch.float32

    def build(self, *parts: Weight, bias: Tensor | None = None, gated: bool = False) -> PackedWeight:
        return pack(*parts, bias=bias, gated=gated)


def pack(*parts: Weight, bias: Tensor | None = None, gated: bool = False) -> PackedWeight:
    """parts: (outputs, inputs) each, floating point or quantised, one below the other; whole panels but for the last.

    Of floats, the smallest form that holds each exactly. gated: the panels of two parts in turn, a gate beside its up.
    """
    dtype = None if alike(parts) else smallest_dtype(parts)
    form = _form(parts[0], dtype)
    outputs, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
    panels = -(-outputs // PANEL)
    data = numpy.empty((panels, inputs // BLOCK), BLOCKS[form])
    for part, room in zip(parts, _rooms(data, parts, gated), strict=True):
        for rows in pieces(part):
            _fill(room[rows.start // PANEL : -(-rows.stop // PANEL)], part[rows], dtype)
    packed_bias = None if bias is None else _pack_bias(bias, parts, gated)
    return PackedWeight(data.reshape(-1).view(numpy.uint8), form, outputs, inputs, packed_bias)


def _pack_bias(bias: Tensor, parts: Sequence[Weight], gated: bool) -> Array:
    """(outputs,) -> (panels * PANEL,)"""
    packed = numpy.zeros((-(-bias.shape[0] // PANEL), PANEL), numpy.float32)
    shares = torch.split(bias, [part.shape[0] for part in parts])
    for share, room in zip(shares, _rooms(packed, parts, gated), strict=True):
        room[...] = _padded(share.float().numpy()).reshape(-1, PANEL)
    return packed.reshape(-1)


def _form(first: Weight, dtype: torch.dtype | None) -> int:
    if dtype is not None:
        return FORMS[dtype]
    assert isinstance(first, Quantized)
    return NIBBLES if first.bits == 4 else BYTES


def _rooms(whole: Array, parts: Sequence[Weight], gated: bool) -> Iterator[Array]:
    """The panels of each part. whole: (panels, ...)."""
    if gated:
        one, other = parts
        assert one.shape == other.shape and one.shape[0] % PANEL == 0
        yield from (whole[0::2], whole[1::2])
        return
    first = 0
    for part in parts:
        assert first % PANEL == 0
        yield whole[first // PANEL : -(-(first + part.shape[0]) // PANEL)]
        first += part.shape[0]


def _fill(room: Array, piece: Weight, dtype: torch.dtype | None) -> None:
    """room: (panels, blocks). dtype: of floats."""
    for name, tensor in _fields(piece, dtype).items():
        rows = _padded(tensor.numpy())  # (outputs, blocks * k), k numbers of an output in a block
        room[name] = rows.reshape(room.shape[0], PANEL, room.shape[1], -1).transpose(0, 2, 3, 1)


def _fields(piece: Weight, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is not None:
        return {"values": dense(piece, dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)}
    assert isinstance(piece, Quantized)
    fields = {"scale": piece.scale, "minimum": piece.minimum, "values": piece.values}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def _padded(rows: Array) -> Array:
    """Zeros behind the last row, up to a whole panel."""
    missing = -rows.shape[0] % PANEL
    return numpy.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows
