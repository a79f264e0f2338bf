"""Weights as quantised files hold them: small integers in groups of 32, each group with its scale.

A weight is scale * q + minimum, in float32: exactly what the file means, since scale * q has at most 19 bits and one
rounding is left. Rows are outputs, so parts of fused projections lie one below the other, and embeddings are looked up.
"""

import dataclasses

import torch
from torch import Tensor

GROUP = 32


@dataclasses.dataclass(frozen=True)
class Quantized:
    """bits 4: values (out, in / 2) uint8, input 2j of byte j in its low half, 2j + 1 in its high one, each 0..15.

    bits 8: values (out, in) int8, and no minimum.
    """

    bits: int  # 4 | 8
    values: Tensor
    scale: Tensor  # (out, in / GROUP) float16
    minimum: Tensor | None  # likewise

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.scale.shape[0], self.scale.shape[1] * GROUP

    def to(self, device: torch.device) -> "Quantized":
        minimum = None if self.minimum is None else self.minimum.to(device)
        return Quantized(self.bits, self.values.to(device), self.scale.to(device), minimum)

    def __getitem__(self, outputs: "slice | Tensor") -> "Quantized":
        """Some rows: a view of a slice, a copy of those that a tensor names."""
        minimum = None if self.minimum is None else self.minimum[outputs]
        return Quantized(self.bits, self.values[outputs], self.scale[outputs], minimum)

    def clone(self) -> "Quantized":
        minimum = None if self.minimum is None else self.minimum.clone()
        return Quantized(self.bits, self.values.clone(), self.scale.clone(), minimum)

    def rows(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, in) float32: an embedding's lookup."""
        return self[tokens].dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)"""
        out, groups = self.scale.shape
        values = self.values
        if self.bits == 4:
            values = torch.stack((values & 15, values >> 4), dim=-1)
        weight = values.reshape(out, groups, GROUP).to(torch.float32).mul_(self.scale.float().unsqueeze(-1))
        if self.minimum is not None:
            weight.add_(self.minimum.float().unsqueeze(-1))
        return weight.view(out, groups * GROUP).to(dtype)


Weight = Tensor | Quantized
