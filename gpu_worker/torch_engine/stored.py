"""Weights as files hold them, looked at piece by piece, so that a model loads in about the memory that it keeps.

A tensor of a file is a view of its pages. What a backend makes of it is filled in from pieces of PIECE_VALUES numbers;
nothing here ever holds a matrix a second time, in float32 least of all.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpu_worker.torch_engine.quantized import Quantized, Weight

PIECE_VALUES = 1 << 20
PIECE_ROWS = 16  # a piece has a multiple of it, unless it is the last
SMALLER = (torch.float16, torch.bfloat16)


def pieces(weight: Weight) -> Iterator[slice]:
    """Of its rows."""
    rows, width = weight.shape[0], math.prod(weight.shape[1:])
    each = max(1, PIECE_VALUES // (width * PIECE_ROWS)) * PIECE_ROWS
    return (slice(start, min(start + each, rows)) for start in range(0, rows, each))


def dense(piece: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Its numbers in `dtype`; no copy if they are already so."""
    return piece.dequantize(dtype) if isinstance(piece, Quantized) else piece.to(dtype)


def smallest_dtype(parts: Sequence[Weight]) -> torch.dtype:
    """The smallest float type that holds each number of all of them exactly, as far as float32 does."""
    if all(isinstance(part, Tensor) and part.dtype == torch.bfloat16 for part in parts):
        return torch.bfloat16  # of the two of this size the one that needs no look
    for dtype in SMALLER:
        if all(_holds(dtype, part[rows]) for part in parts for rows in pieces(part)):
            return dtype
    return torch.float32


def _holds(dtype: torch.dtype, piece: Weight) -> bool:
    if isinstance(piece, Tensor) and piece.dtype == dtype:
        return True
    numbers = dense(piece)
    return torch.equal(numbers.to(dtype).float(), numbers)


def same(one: Weight, other: Weight, dtype: torch.dtype) -> bool:
    """Whether two weights of one shape are the same numbers in `dtype`."""
    return all(torch.equal(dense(one[rows], dtype), dense(other[rows], dtype)) for rows in pieces(one))


def is_finite(weight: Weight) -> bool:
    """Whether every value is a number. A sum in float32 is none as soon as one of them is none."""
    tensors = (weight,) if isinstance(weight, Tensor) else (weight.scale, weight.minimum)
    return all(
        bool(tensor[rows].sum(dtype=torch.float32).isfinite())
        for tensor in tensors
        if tensor is not None
        for rows in pieces(tensor)
    )


def cat(parts: Sequence[Weight], dtype: torch.dtype, device: torch.device) -> Weight:
    """One below the other, on `device`: quantised if all parts are so, and alike; else all in `dtype`.

    A single part that is already so is answered itself, not a copy.
    """
    first = parts[0]
    if isinstance(first, Quantized) and alike(parts):
        whole = [part.to(device) for part in parts if isinstance(part, Quantized)]
        minima = [part.minimum for part in whole if part.minimum is not None]
        return Quantized(
            first.bits,
            torch.cat([part.values for part in whole]),
            torch.cat([part.scale for part in whole]),
            torch.cat(minima) if minima else None,
        )
    if len(parts) == 1 and isinstance(first, Tensor):
        return first.to(device, dtype)
    filled = torch.empty(sum(part.shape[0] for part in parts), first.shape[1], dtype=dtype, device=device)
    for part, room in zip(parts, torch.split(filled, [part.shape[0] for part in parts]), strict=True):
        for rows in pieces(part):
            room[rows] = dense(part[rows], dtype)
    return filled


def alike(parts: Sequence[Weight]) -> bool:
    """Whether all are quantised, in one way."""
    kinds = {(part.bits, part.minimum is None) if isinstance(part, Quantized) else None for part in parts}
    return len(kinds) == 1 and None not in kinds
