"""Attention in place over paged keys and values: `torch.nn.attention.varlen.varlen_attn`, FlashAttention inside, or
where that cannot be used a kernel of our own that is called alike (`triton_attention.py`).

Keys and values of a layer are two tensors (blocks + 1, BLOCK_TOKENS, kv_heads, head_dim); a row's slot is
block * BLOCK_TOKENS + place. FlashAttention 2 takes pages of a multiple of 256 tokens, so that is the block here: a
prefix is found again in steps of 256 tokens. (FlashAttention 3 takes smaller ones, and does not come with torch.)

Pieces of one row and pieces of many are two calls, since the kernel treats them differently:

    decode rows      max_q 1, not causal (a last row sees all): the query heads of a key/value head become rows of one
                     product, and long contexts are split over the GPU's processors
    prefill chunks   causal, aligned to the last key, one split: the kernel puts split results of packed queries in the
                     wrong rows (github.com/pytorch/pytorch/issues/194167, seen up to torch 2.13)

`probe` tries both with the model's own heads before anything rests on them.
"""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import reference_attend
from gpu_worker.torch_engine.batch import Batch, Piece
from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.ops import Ops
from gpu_worker.torch_engine.rope import rotary_tables
from gpu_worker.torch_engine.transfer import send

BLOCK_TOKENS = 256
CAUSAL, FULL = (-1, 0), (-1, -1)  # windows (left, right) of varlen_attn


class VarlenAttention(Protocol):
    """What `varlen_attn` is to us: queries (rows, heads, head_dim) packed one sequence after the other."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,  # (pages, page tokens, kv_heads, head_dim)
        value: Tensor,
        cu_seq_q: Tensor,  # (sequences + 1,) int32: first row of each, and the end
        cu_seq_k: Tensor,  # (sequences + 1,) int32: likewise of its keys
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: Tensor,  # (sequences,) int32: keys of each
        block_table: Tensor,  # (sequences, pages) int32
        num_splits: int | None,
    ) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Probed:
    """A kernel, and what it gets right on this machine."""

    name: str  # for the log
    varlen: VarlenAttention
    decode_splits: int | None  # None: it may choose


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernel: some neighbouring pieces, as it wants them described. Tensors int32, on the device."""

    rows: slice  # of the batch
    row_starts: Tensor  # (pieces + 1,) counted from the first of `rows`
    key_starts: Tensor  # (pieces + 1,)
    lengths: Tensor  # (pieces,) keys that a piece's last row sees
    block_table: Tensor  # (pieces, width)
    rows_max: int
    length_max: int

    @property
    def decodes(self) -> bool:
        return self.rows_max == 1

    def to(self, device: torch.device) -> "Call":
        return dataclasses.replace(
            self,
            row_starts=send(self.row_starts, device),
            key_starts=send(self.key_starts, device),
            lengths=send(self.lengths, device),
            block_table=send(self.block_table, device),
        )


def host_calls(pieces: tuple[Piece, ...]) -> list[Call]:
    """Pieces of one row, which come first, and all others. Tensors on the host."""
    single = next((n for n, piece in enumerate(pieces) if piece.count > 1), len(pieces))
    return [host_call(part) for part in (pieces[:single], pieces[single:]) if part]


def host_call(pieces: tuple[Piece, ...]) -> Call:
    first, last = pieces[0], pieces[-1]
    end = last.first_row + last.count
    lengths = torch.tensor([piece.length for piece in pieces], dtype=torch.int32)
    starts = [piece.first_row - first.first_row for piece in pieces]
    width = max(len(piece.blocks) for piece in pieces)
    table = [piece.blocks + [NULL_BLOCK] * (width - len(piece.blocks)) for piece in pieces]
    return Call(
        rows=slice(first.first_row, end),
        row_starts=torch.tensor([*starts, end - first.first_row], dtype=torch.int32),
        key_starts=ends(lengths),
        lengths=lengths,
        block_table=torch.tensor(table, dtype=torch.int32),
        rows_max=max(piece.count for piece in pieces),
        length_max=max(piece.length for piece in pieces),
    )


def ends(lengths: Tensor) -> Tensor:
    """(n,) -> (n + 1,): where each begins when they lie one behind the other, and the end. int32."""
    return functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


class PagedAttention:
    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        blocks: int,
        *,
        context: int,
        kernel: Probed,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (blocks + 1, BLOCK_TOKENS, config.kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.kind = f"paged, {kernel.name}"
        self.config = config
        self.device = device
        self.cos, self.sin = rotary_tables(config, context, device, dtype)
        self.kernel = kernel
        self.ops = ops

    def plan(self, batch: Batch) -> "PagedStep":
        calls = [call.to(self.device) for call in host_calls(batch.pieces)]
        return self.step(send(batch.positions, self.device), send(batch.slots, self.device), calls)

    def step(self, positions: Tensor, slots: Tensor, calls: list[Call]) -> "PagedStep":
        """positions, slots: (rows,) on the device. Nothing here waits for it or looks into its tensors."""
        return PagedStep(self, slots, self.cos[positions], self.sin[positions], calls)

    def clear(self, blocks: list[int]) -> None:
        at = send(torch.tensor(blocks), self.device)
        for cache in (*self.keys, *self.values):
            cache.index_fill_(0, at, 0)


@dataclasses.dataclass(frozen=True)
class PagedStep:
    attention: PagedAttention
    slots: Tensor  # (rows,)
    cos: Tensor  # (rows, head_dim)
    sin: Tensor
    calls: list[Call]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        attention = self.attention
        keys, values = attention.keys[layer], attention.values[layer]
        attention.ops.rotate_and_store(qkv[: self.slots.shape[0]], self.cos, self.sin, self.slots, keys, values)
        queries = qkv[:, : attention.config.heads]
        results = [run_call(attention.kernel, queries[call.rows], keys, values, call) for call in self.calls]
        return (results[0] if len(results) == 1 else torch.cat(results)).flatten(1)


def run_call(kernel: Probed, queries: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
    """queries: (the call's rows, heads, head_dim), rotated. Returns the like."""
    return kernel.varlen(
        queries,
        keys,
        values,
        call.row_starts,
        call.key_starts,
        call.rows_max,
        call.length_max,
        scale=queries.shape[2] ** -0.5,
        window_size=FULL if call.decodes else CAUSAL,
        enable_gqa=queries.shape[1] > keys.shape[2],
        seqused_k=call.lengths,
        block_table=call.block_table,
        num_splits=kernel.decode_splits if call.decodes else 1,
    )


PROBE_PIECES = ((1, 1), (1, 3), (1, 257), (1, 900), (70, 300), (200, 200))  # rows, keys
PROBE_TOLERANCE = 0.03  # of results below 1 in bfloat16, whose rounding is a tenth of this; a wrong row is far off


def probe(
    name: str, varlen: VarlenAttention, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Probed | str:
    """Try the kernel with the model's heads; the reason if it cannot be used."""
    try:
        # Only query heads that share keys become rows of a call of their own, where split results land rightly.
        for splits in (None, 1) if config.group > 1 else (1,):
            kernel = Probed(name, varlen, splits)
            if probe_error(kernel, config, device, dtype) < PROBE_TOLERANCE:
                return kernel
    # Too old a GPU, a torch whose form of it takes other arguments (2.11's knows no pages), a compiler that is missing.
    except Exception as error:  # noqa: BLE001 - there are as many ways as compilers, and another kernel may do
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "its results are wrong"


def probe_error(kernel: Probed, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from the plain form, over decode rows and chunks; infinite if a row is not finite."""
    pieces, row, block = [], 0, 1
    for count, length in PROBE_PIECES:
        blocks = list(range(block, block + -(-length // BLOCK_TOKENS)))
        pieces.append(Piece(row, length - count, count, blocks))
        row, block = row + count, block + len(blocks)
    generator = torch.Generator().manual_seed(4)
    pool = (2, block, BLOCK_TOKENS, config.kv_heads, config.head_dim)
    keys, values = torch.randn(pool, generator=generator).to(device, dtype)
    queries = torch.randn(row, config.heads, config.head_dim, generator=generator).to(device, dtype)
    worst = 0.0
    for call in host_calls(tuple(pieces)):
        found = run_call(kernel, queries[call.rows], keys, values, call.to(device)).float()
        for piece in pieces[:4] if call.decodes else pieces[4:]:
            rows = slice(piece.first_row - call.rows.start, piece.first_row - call.rows.start + piece.count)
            own_keys, own_values = (part[piece.blocks].flatten(0, 1)[: piece.length].float() for part in (keys, values))
            own = queries[piece.first_row : piece.first_row + piece.count].float() * config.head_dim**-0.5
            positions = torch.arange(piece.start, piece.length, device=device)
            expected = reference_attend(own, own_keys, own_values, positions)
            worst = max(worst, float((found[rows].flatten(1) - expected).abs().nan_to_num(nan=math.inf).max()))
    return worst
