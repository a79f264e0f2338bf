"""One weight matrix as the kernels read it: panels of 16 outputs, in blocks of 32 inputs, in the form it was stored in.

    | form    | a block of 32 inputs x 16 outputs                                       | bytes | bits a weight |
    |---------|-------------------------------------------------------------------------|------:|--------------:|
    | nibbles | 16 scales, 16 minima (float16), 32 x 16 numbers from 0 to 15            |   320 |             5 |
    | bytes   | 16 scales (float16), 32 x 16 numbers from -127 to 127                   |   544 |           8.5 |
    | half    | 32 x 16 float16                                                         |  1024 |            16 |
    | bfloat  | 32 x 16 bfloat16                                                        |  1024 |            16 |
    | float   | 32 x 16 float32                                                         |  2048 |            32 |

A form is only taken if it holds each weight exactly; arithmetic is float32 in all of them. Nibbles of two inputs that
follow each other share a byte, the first in its lower half. Outputs are padded with zeros to whole panels. Of gate and
up projection, which come out as one, the panels lie in turn. packing.py puts weights into these forms.
"""

import dataclasses
from typing import Any

import numpy

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
