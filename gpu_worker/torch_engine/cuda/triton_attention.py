# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Triton reads the annotations of its kernels and refuses Python types there.
"""Attention over paged keys and values as a Triton kernel, for a torch whose `varlen_attn` knows no pages.

`triton_varlen` stands in for `varlen_attn` as `paged.py` calls it. A program takes a tile of queries of one sequence
and one key/value head. All query heads of that head are rows of the tile, so keys are read once for all of them:

    tile row      0  1  2  3  4  5  6  7 ...      three query heads to a key/value head
    query row     0  0  0  1  1  1  2  2
    query head    0  1  2  0  1  2  0  1
    sees keys up to position  length - count + query row

It goes through its keys tile by tile with the softmax kept up to date (Milakov and Gimelshein, 2018), in float32 but
for the products, whose factors are in the inputs' dtype. Decode rows are too few to fill a GPU, so their keys are split
into parts, each with a program of its own, and a second kernel puts the parts together (Flash-Decoding, 2023).

Lengths are read on the device, and the launch depends on nothing but the number of rows, so graphs can hold it. Nothing
is tuned at run time, and no number that changes from step to step makes Triton compile anew.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.torch_engine.cuda.paged import CAUSAL

PROGRAMS = 512  # of one launch, about: some for each of 100 to 150 processors, and they share one
SPLITS_MAX = 32
DOT_MIN = 16  # rows of a product, at least
LOG2_E = math.log2(math.e)  # exp2 is what the hardware has


def triton_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """As `paged.VarlenAttention` says. num_splits, which keeps another kernel from its mistakes, is not looked at."""
    rows, heads, head_dim = query.shape
    page, kv_heads = key.shape[1], key.shape[2]
    sequences = block_table.shape[0]
    group = heads // kv_heads
    assert max_q == 1 or window_size == CAUSAL  # one row sees all keys either way
    assert query.stride()[1:] == (head_dim, 1) and key.is_contiguous() and value.is_contiguous()
    assert block_table.stride(1) == 1
    width = max(DOT_MIN, triton.next_power_of_2(head_dim))
    keys = 64 if width <= 128 else 32
    assert page % keys == 0  # so a tile of keys lies in one page
    tile = max(DOT_MIN, triton.next_power_of_2(group)) if max_q == 1 else (128 if width <= 128 else 64)
    splits = choose_splits(sequences * kv_heads) if max_q == 1 else 1
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    parts, sums = output, None
    if splits > 1:
        parts = torch.empty(splits, rows, heads, head_dim, device=query.device, dtype=torch.float32)
        sums = torch.empty(splits, rows, heads, device=query.device, dtype=torch.float32)
    attend_kernel[(sequences * kv_heads, triton.cdiv(max_q * group, tile), splits)](
        query,
        key,
        value,
        parts,
        sums,
        cu_seq_q,
        seqused_k,
        block_table,
        scale * LOG2_E,
        rows,
        query.stride(0),
        block_table.stride(0),
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page=page,
        width=width,
        tile=tile,
        keys=keys,
        num_warps=8 if tile == 128 else 4,
        num_stages=2,
    )
    if sums is not None:
        combine_kernel[(rows * heads,)](
            parts, sums, output, splits, head_dim=head_dim, width=width, splits_max=SPLITS_MAX, num_warps=2
        )
    return output


def choose_splits(programs: int) -> int:
    """Parts of each sequence's keys. Not by their number, which is not known on the host: some parts may be empty."""
    return max(1, min(SPLITS_MAX, PROGRAMS // programs))


@triton.jit(
    do_not_specialize=["rows", "table_stride"],
    do_not_specialize_on_alignment=["row_starts", "lengths", "block_table"],
)
def attend_kernel(
    query,  # (rows, heads, head_dim), rows query_stride apart
    key,  # (pages, page, kv_heads, head_dim)
    value,
    parts,  # (splits, rows, heads, head_dim)
    sums,  # (splits, rows, heads): log2 of the sum of exp2 of the scores; None: one split
    row_starts,
    lengths,
    block_table,
    scale,
    rows,
    query_stride,
    table_stride,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    page: tl.constexpr,
    width: tl.constexpr,  # head_dim as a power of two
    tile: tl.constexpr,
    keys: tl.constexpr,
):
    sequence, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    split = tl.program_id(2)
    start = tl.load(row_starts + sequence)
    count = tl.load(row_starts + sequence + 1) - start
    length = tl.load(lengths + sequence)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * tile  # those that see most begin first
    if first >= count * group:
        return
    at = first + tl.arange(0, tile)
    row, head = at // group, kv_head * group + at % group
    inside = row < count
    position = length - count + row
    dim = tl.arange(0, width)
    own = inside[:, None] & (dim < head_dim)[None, :]
    place = (start + row).to(tl.int64) * query_stride + head * head_dim
    queries = tl.load(query + place[:, None] + dim[None, :], mask=own, other=0.0)

    last_row = tl.minimum(count - 1, (first + tile - 1) // group)
    tiles = tl.cdiv(length - count + last_row + 1, keys)
    each = tl.cdiv(tiles, tl.num_programs(2))
    best = tl.full([tile], -float("inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    result = tl.zeros([tile, width], tl.float32)
    for n in range(split * each, tl.minimum((split + 1) * each, tiles)):
        token = n * keys + tl.arange(0, keys)
        block = tl.load(block_table + sequence * table_stride + n * keys // page).to(tl.int64)
        offset = ((block * page + token % page) * kv_heads + kv_head) * head_dim
        there = (token < length)[:, None] & (dim < head_dim)[None, :]
        seen = tl.load(key + offset[:, None] + dim[None, :], mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(seen)) * scale
        scores = tl.where(token[None, :] <= position[:, None], scores, -float("inf"))
        # Never infinite: each row sees the first key of the first tile, and a split row all keys that are there.
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 1)
        content = tl.load(value + offset[:, None] + dim[None, :], mask=there, other=0.0)
        result = result * shrink[:, None] + tl.dot(weights.to(content.dtype), content)
        best = better

    result = result / tl.where(total > 0, total, 1.0)[:, None]  # nothing: a part without keys
    target = (split.to(tl.int64) * rows + start + row) * (kv_heads * group) + head
    tl.store(parts + target[:, None] * head_dim + dim[None, :], result.to(parts.dtype.element_ty), mask=own)
    if sums is not None:
        tl.store(sums + target, best + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(parts, sums, output, splits, head_dim: tl.constexpr, width: tl.constexpr, splits_max: tl.constexpr):
    """One head of one row: its parts by their shares of the softmax, which a part without keys has none of."""
    at, every = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split, dim = tl.arange(0, splits_max), tl.arange(0, width)
    place = split.to(tl.int64) * every + at
    sum_of = tl.load(sums + place, mask=split < splits, other=-float("inf"))
    shares = tl.exp2(sum_of - tl.max(sum_of))
    there = (split < splits)[:, None] & (dim < head_dim)[None, :]
    results = tl.load(parts + place[:, None] * head_dim + dim[None, :], mask=there, other=0.0)
    result = tl.sum(results * shares[:, None], 0) / tl.sum(shares)
    tl.store(output + at * head_dim + dim, result.to(output.dtype.element_ty), mask=dim < head_dim)
