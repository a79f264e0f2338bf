"""From a plan to the numbers of one step: one flat list of tokens, `[decode rows | prefill chunks]`.

All of it lies on the host and knows no device: a backend copies what it needs, once a step.
"""

import dataclasses
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK
from gpu_worker.torch_engine.plan import Plan, Work


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of rows that are consecutive tokens of one sequence. Each sees the tokens up to its own position."""

    first_row: int
    start: int  # position of the first row
    count: int  # rows
    blocks: list[int]  # of positions 0 to `length`, in order

    @property
    def length(self) -> int:
        """Tokens that the last row sees, its own included."""
        return self.start + self.count


@dataclasses.dataclass(frozen=True)
class Batch:
    work: tuple[Work, ...]  # in the order of their rows
    pieces: tuple[Piece, ...]  # one for each
    tokens: Tensor  # (rows,) int64
    positions: Tensor  # (rows,) int64
    slots: Tensor  # (rows,) int64: block * block_tokens + place in the block, where the row's keys and values go
    last_rows: Tensor  # (pieces,) int64: the last row of each piece
    sample_rows: Tensor  # (sampled rows,) int64: rows that a token is drawn from, in the order of the work

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def row_starts(self) -> Tensor:
        """(pieces + 1,) int32: piece p has the rows from row_starts[p] to before row_starts[p + 1]."""
        return torch.tensor([*(piece.first_row for piece in self.pieces), self.rows], dtype=torch.int32)

    @cached_property
    def lengths(self) -> Tensor:
        """(pieces,) int32: tokens that each piece's last row sees."""
        return torch.tensor([piece.length for piece in self.pieces], dtype=torch.int32)

    @cached_property
    def block_table(self) -> Tensor:
        """(pieces, width) int32: each piece's blocks, padded with the null block to the longest."""
        width = max(len(piece.blocks) for piece in self.pieces)
        padded = [piece.blocks + [NULL_BLOCK] * (width - len(piece.blocks)) for piece in self.pieces]
        return torch.tensor(padded, dtype=torch.int32)


def build_batch(plan: Plan, *, block_tokens: int) -> Batch:
    """Decode rows of like length lie side by side, so that a backend may group them without a gather."""
    work = (*sorted(plan.decode, key=lambda one: (one.count, one.start)), *plan.prefill)
    first_rows = list(accumulate((one.count for one in work), initial=0))
    pieces = tuple(_piece(one, row, block_tokens) for one, row in zip(work, first_rows, strict=False))
    positions = [position for piece in pieces for position in range(piece.start, piece.length)]
    slots = [
        piece.blocks[position // block_tokens] * block_tokens + position % block_tokens
        for piece in pieces
        for position in range(piece.start, piece.length)
    ]
    sample_rows = [row for one, end in zip(work, first_rows[1:], strict=True) for row in range(end - one.sampled, end)]
    return Batch(
        work=work,
        pieces=pieces,
        tokens=torch.tensor([token for one in work for token in one.tokens]),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        last_rows=torch.tensor(first_rows[1:]) - 1,
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
    )


def _piece(work: Work, first_row: int, block_tokens: int) -> Piece:
    owned = work.sequence.blocks[: -(-(work.start + work.count) // block_tokens)]
    return Piece(first_row, work.start, work.count, owned)
