"""One weight matrix as the kernels read it: panels of 16 outputs, in blocks of 32 inputs, in the form it was stored in.

    | form    | a block of 32 inputs x 16 outputs                                       | bytes | bits a weight |
    |---------|-------------------------------------------------------------------------|------:|--------------:|
    | nibbles | 16 scales, 16 minima (float16), 32 x 16 numbers from 0 to 15            |   320 |             5 |
    | bytes   | 16 scales (float16), 32 x 16 numbers from -127 to 127                   |   544 |           8.5 |
    | half    | 32 x 16 float16                                                         |  1024 |            16 |
    | bfloat  | 32 x 16 bfloat16                                                        |  1024 |            16 |
    | float   | 32 x 16 float32                                                         |  2048 |            32 |

A form is only taken if it holds each weight exactly; arithmetic is float32 in all of them. Nibbles of two inputs that
follow each other share a byte, the first in its lower half. Outputs are padded with zeros to whole panels.
"""

import dataclasses
from typing import Any

import numpy
import torch
from torch import Tensor

from gpu_worker.torch_engine.quantized import Quantized, Weight

PANEL = 16  # outputs
BLOCK = 32  # inputs

NIBBLES, BYTES, HALF, BFLOAT, FLOAT = range(5)
FORM_NAMES = ("nibbles", "bytes", "half", "bfloat", "float")
BLOCK_BYTES = (320, 544, 1024, 1024, 2048)

Array = numpy.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """y = x W^T + bias. `data`: panels of blocks, one after another."""

    data: Array  # uint8
    form: int
    outputs: int
    inputs: int
    bias: Array | None  # (panels * PANEL,) float32

    @property
    def kind(self) -> str:
        return FORM_NAMES[self.form]

    @property
    def weight_bytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def panels(self) -> int:
        return -(-self.outputs // PANEL)

    @property
    def blocks(self) -> int:
        return self.inputs // BLOCK

    def interleaved(self) -> "PackedWeight":
        """The panels of the first half of the outputs and those of the second in turn: a gate beside its up."""
        assert self.outputs % (2 * PANEL) == 0
        halves = self.data.reshape(2, self.panels // 2, -1)
        bias = self.bias
        if bias is not None:
            bias = numpy.ascontiguousarray(bias.reshape(2, -1, PANEL).swapaxes(0, 1)).reshape(-1)
        data = numpy.ascontiguousarray(halves.swapaxes(0, 1)).reshape(-1)
        return dataclasses.replace(self, data=data, bias=bias)


class PackedFactory:
    """Weights for the kernels, as the loader asks for them."""

    device = torch.device("cpu")
    dtype = torch.float32

    def build(self, weight: Weight, bias: Tensor | None = None) -> PackedWeight:
        return pack(weight, bias)


def pack(weight: Weight, bias: Tensor | None = None) -> PackedWeight:
    """weight: (outputs, inputs), floating point or quantised. Of floats, the smallest form that holds each exactly."""
    outputs, inputs = weight.shape
    if isinstance(weight, Quantized):
        data = _pack_nibbles(weight) if weight.bits == 4 else _pack_bytes(weight)
        form = NIBBLES if weight.bits == 4 else BYTES
    else:
        form, stored = _smallest(weight)
        data = _panels(_padded(stored.numpy()), inputs).reshape(-1).view(numpy.uint8)
    padded_bias = None if bias is None else _padded(bias.float().numpy())
    return PackedWeight(data, form, outputs, inputs, padded_bias)


def _smallest(weight: Tensor) -> tuple[int, Tensor]:
    """The form and the weight in it, as integers of the form's width."""
    if weight.dtype == torch.bfloat16:
        return BFLOAT, weight.view(torch.int16)
    for form, dtype in ((HALF, torch.float16), (BFLOAT, torch.bfloat16)):
        held = weight.to(dtype)
        if torch.equal(held.to(weight.dtype), weight):
            return form, held.view(torch.int16)
    return FLOAT, weight.float().view(torch.int32)


def _padded(rows: Array) -> Array:
    """Zeros behind the last row, up to a whole panel."""
    missing = -rows.shape[0] % PANEL
    return numpy.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows


def _panels(rows: Array, inputs: int) -> Array:
    """(outputs, inputs) -> (panels, blocks, BLOCK, PANEL), contiguous."""
    shaped = rows.reshape(-1, PANEL, inputs // BLOCK, BLOCK)
    return numpy.ascontiguousarray(shaped.transpose(0, 2, 3, 1))


def _scales(scale: Tensor) -> Array:
    """(outputs, blocks) float16 -> (panels, blocks, 32 bytes)."""
    rows = _padded(scale.numpy())
    shaped = numpy.ascontiguousarray(rows.reshape(-1, PANEL, rows.shape[1]).transpose(0, 2, 1))
    return shaped.view(numpy.uint8).reshape(-1, rows.shape[1], 2 * PANEL)


def _pack_nibbles(weight: Quantized) -> Array:
    assert weight.minimum is not None
    pairs = _padded(weight.values.numpy())  # (outputs, inputs / 2): the pairs lie in bytes as they should
    blocks = pairs.shape[1] // (BLOCK // 2)
    numbers = pairs.reshape(-1, PANEL, blocks, BLOCK // 2).transpose(0, 2, 3, 1).reshape(-1, blocks, 256)
    return numpy.concatenate([_scales(weight.scale), _scales(weight.minimum), numbers], axis=2).reshape(-1)


def _pack_bytes(weight: Quantized) -> Array:
    rows = _padded(weight.values.numpy())
    numbers = _panels(rows, rows.shape[1]).reshape(rows.shape[0] // PANEL, -1, BLOCK * PANEL).view(numpy.uint8)
    return numpy.concatenate([_scales(weight.scale), numbers], axis=2).reshape(-1)
