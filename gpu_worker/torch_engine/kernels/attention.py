"""Attention over paged keys and values, read where they lie.

A unit of work is a *span*, a few query tokens of one sequence, with one key/value head: the query heads that share it
are further rows, so keys are never expanded. Scores are products of these rows and key panels, the result is a product
of the probabilities and value panels: the kernels are those of products.py.

The same bits for a row whatever its span or batch: a score is one chain over the head's numbers, a sum of
probabilities goes over the keys in their order, and keys that a row must not see weigh exactly 0.

Scratch of a thread, in this order, each for SPAN_ROWS rows or one token's query heads if these are more: queries and
results (rows, head_dim), sums (rows,), scores (rows, context).
"""

from typing import Any

import numpy

from gpu_worker.torch_engine.kernels.functions import exponential, maximum, total
from gpu_worker.torch_engine.kernels.products import plain
from gpu_worker.torch_engine.kernels.rows import BLOCK_TOKENS, KEY_PANEL, VALUE_PANEL
from gpu_worker.torch_engine.kernels.vectors import (
    add,
    compiled,
    get,
    get_int,
    largest,
    load,
    mul,
    put,
    splat,
    store,
    store_tile,
    sub,
    tile1,
    tile2,
    tile3,
    tile4,
    tile5,
    tile6,
)

SPAN_ROWS = 24  # of a span: so many share a key panel while it is in the first cache
SPAN_FIELDS = 4  # int32 each: first row, tokens, position of the first, row of the block table
_LEAST = numpy.float32(-numpy.inf)
_ZERO, _ONE = numpy.float32(0.0), numpy.float32(1.0)


def span_tokens(group: int) -> int:
    """Query tokens of one span, for `group` query heads per key/value head."""
    return max(1, SPAN_ROWS // group)


def scratch_bytes(group: int, head_dim: int, context: int) -> int:
    """What one thread needs, keys rounded up to whole blocks."""
    rows = span_tokens(group) * group
    padded = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS
    return 4 * rows * (2 * head_dim + 8 + padded)


@compiled
def attend(op: Any, step: Any, first: int, last: int, scratch: int) -> None:
    """Units first..last: span * kv_heads + head."""
    for unit in range(first, last):
        attend_span(op, step, step.spans + 4 * SPAN_FIELDS * (unit // step.kv_heads), unit % step.kv_heads, scratch)


@compiled
def attend_span(op: Any, step: Any, span: int, head: int, scratch: int) -> None:
    row, tokens, start = get_int(span), get_int(span + 4), get_int(span + 8)
    table = step.block_table + 4 * step.table_width * get_int(span + 12)
    rows, width = tokens * step.group, 4 * step.head_dim
    keys = start + tokens
    blocks = (keys + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    queries, results = scratch, scratch + rows * width
    sums = results + rows * width
    scores, stride = sums + 32 * rows, 4 * BLOCK_TOKENS * blocks

    take_queries(op, step, row, tokens, head, queries)
    for index in range(blocks):
        block = get_int(table + 4 * index) * step.kv_heads + head
        for half in range(BLOCK_TOKENS // KEY_PANEL):
            panel = op.keys + block * BLOCK_TOKENS * width + half * KEY_PANEL * width
            score_rows(
                queries, rows, step.head_dim, panel, scores + 4 * (BLOCK_TOKENS * index + KEY_PANEL * half), stride
            )
    for index in range(rows):
        visible = start + index // step.group + 1
        put(sums + 4 * index, weigh(scores + index * stride, visible, BLOCK_TOKENS * blocks))
    for panel in range(step.head_dim // VALUE_PANEL):
        weighted_rows(op, step, table, blocks, head, panel, scores, stride, rows, results)
    give_results(op, step, row, tokens, head, results, sums)


@compiled
def take_queries(op: Any, step: Any, row: int, tokens: int, head: int, queries: int) -> None:
    """The span's rotated queries, one after another and scaled."""
    scale, width = splat(step.scale), 4 * step.head_dim
    for token in range(tokens):
        for member in range(step.group):
            x = op.x + (row + token) * op.x_stride + (head * step.group + member) * width
            for at in range(0, width, 32):
                store(queries + at, mul(load(x + at), scale))
            queries += width


@compiled
def score_rows(queries: int, rows: int, head_dim: int, panel: int, out: int, stride: int) -> None:
    """One key panel: scores of its 16 tokens for all rows."""
    width = 4 * head_dim
    for _ in range(rows // 6):
        store_tile(plain(tile6(), queries, width, panel, head_dim), out, stride)
        queries += 6 * width
        out += 6 * stride
    rest = rows % 6
    if rest == 1:
        store_tile(plain(tile1(), queries, width, panel, head_dim), out, stride)
    elif rest == 2:
        store_tile(plain(tile2(), queries, width, panel, head_dim), out, stride)
    elif rest == 3:
        store_tile(plain(tile3(), queries, width, panel, head_dim), out, stride)
    elif rest == 4:
        store_tile(plain(tile4(), queries, width, panel, head_dim), out, stride)
    elif rest == 5:
        store_tile(plain(tile5(), queries, width, panel, head_dim), out, stride)


@compiled
def weigh(scores: int, visible: int, count: int) -> Any:
    """Scores of one row to unscaled probabilities, 0 from `visible` on. Returns their sum. count: a multiple of 32."""
    for index in range(visible, count):
        put(scores + 4 * index, _LEAST)
    most = load(scores)
    for at in range(32, 4 * count, 32):
        most = largest(load(scores + at), most)
    highest = splat(maximum(most))
    sums = splat(_ZERO)
    for at in range(0, 4 * count, 32):
        weight = exponential(sub(load(scores + at), highest))
        store(scores + at, weight)
        sums = add(sums, weight)
    return total(sums)


@compiled
def weighted_panel(
    tile: Any, op: Any, step: Any, table: int, blocks: int, head: int, panel: int, scores: int, stride: int
) -> Any:
    """Sum over all keys of probability times value, for 16 numbers of the head and as many rows as `tile` has."""
    block_bytes = 4 * BLOCK_TOKENS * step.head_dim
    for index in range(blocks):
        block = get_int(table + 4 * index) * step.kv_heads + head
        values = op.values + block * block_bytes + panel * BLOCK_TOKENS * 4 * VALUE_PANEL
        tile = plain(tile, scores + 4 * BLOCK_TOKENS * index, stride, values, BLOCK_TOKENS)
    return tile


@compiled
def weighted_rows(
    op: Any,
    step: Any,
    table: int,
    blocks: int,
    head: int,
    panel: int,
    scores: int,
    stride: int,
    rows: int,
    results: int,
) -> None:
    width = 4 * step.head_dim
    out = results + 4 * VALUE_PANEL * panel
    for _ in range(rows // 6):
        store_tile(weighted_panel(tile6(), op, step, table, blocks, head, panel, scores, stride), out, width)
        scores += 6 * stride
        out += 6 * width
    rest = rows % 6
    if rest == 1:
        store_tile(weighted_panel(tile1(), op, step, table, blocks, head, panel, scores, stride), out, width)
    elif rest == 2:
        store_tile(weighted_panel(tile2(), op, step, table, blocks, head, panel, scores, stride), out, width)
    elif rest == 3:
        store_tile(weighted_panel(tile3(), op, step, table, blocks, head, panel, scores, stride), out, width)
    elif rest == 4:
        store_tile(weighted_panel(tile4(), op, step, table, blocks, head, panel, scores, stride), out, width)
    elif rest == 5:
        store_tile(weighted_panel(tile5(), op, step, table, blocks, head, panel, scores, stride), out, width)


@compiled
def give_results(op: Any, step: Any, row: int, tokens: int, head: int, results: int, sums: int) -> None:
    """Divided by their sums, each to its token and query head."""
    width = 4 * step.head_dim
    for token in range(tokens):
        for member in range(step.group):
            out = op.out + (row + token) * op.out_stride + (head * step.group + member) * width
            scale = splat(_ONE / get(sums))
            for at in range(0, width, 32):
                store(out + at, mul(load(results + at), scale))
            results += width
            sums += 4
