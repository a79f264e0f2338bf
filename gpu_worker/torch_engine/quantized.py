"""Weights as quantised files hold them: small integers in groups of 32, each group with its scale.

A weight is scale * q + minimum, in float32: exactly what the file means, since scale * q has at most 19 bits and one
rounding is left. Rows are outputs, so parts of fused projections lie one below the other, and embeddings are looked up.
"""

import dataclasses
from collections.abc import Sequence

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

    def rows(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, in) float32: an embedding's lookup."""
        minimum = None if self.minimum is None else self.minimum[tokens]
        return Quantized(self.bits, self.values[tokens], self.scale[tokens], minimum).dequantize()

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


def cat(parts: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """One below the other: quantised if all parts are so, and alike; else all in `dtype`."""
    whole = [part for part in parts if isinstance(part, Quantized)]
    kinds = {(part.bits, part.minimum is None) for part in whole}
    if len(whole) == len(parts) and len(kinds) == 1:
        minima = [part.minimum for part in whole if part.minimum is not None]
        return Quantized(
            whole[0].bits,
            torch.cat([part.values for part in whole]),
            torch.cat([part.scale for part in whole]),
            torch.cat(minima) if minima else None,
        )
    return torch.cat([part.dequantize(dtype) if isinstance(part, Quantized) else part for part in parts])


def is_finite(weight: Weight) -> bool:
    """Whether every value is a number. A sum in float32 is none as soon as one of them is none."""
    parts = (weight,) if isinstance(weight, Tensor) else (weight.scale, weight.minimum)
    return all(bool(part.sum(dtype=torch.float32).isfinite()) for part in parts if part is not None)
