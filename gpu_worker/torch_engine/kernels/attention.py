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
    load_tile,
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


def scratch_bytes(heads: int, group: int, head_dim: int, context: int) -> int:
    """What one thread needs, keys rounded up to whole blocks."""
    rows = max(span_tokens(group) * group, heads)
    padded = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS
    return 4 * rows * (2 * head_dim + 8 + padded)


@compiled
def attend(op: Any, step: Any, first: int, last: int, scratch: int) -> None:
    """Units first..last: span * parts + part. The key/value heads of a part are `op.heads`, the last may be fewer."""
    parts = (step.kv_heads + op.heads - 1) // op.heads
    for unit in range(first, last):
        span, head = step.spans + 4 * SPAN_FIELDS * (unit // parts), unit % parts * op.heads
        end = min(head + op.heads, step.kv_heads)
        if get_int(span + 4) == 1:
            attend_span(op, step, span, head, end, scratch)
        else:
            for one in range(head, end):
                attend_span(op, step, span, one, one + 1, scratch)


@compiled
def attend_span(op: Any, step: Any, span: int, first_head: int, last_head: int, scratch: int) -> None:
    row, tokens, start = get_int(span), get_int(span + 4), get_int(span + 8)
    table = step.block_table + 4 * step.table_width * get_int(span + 12)
    rows, width = tokens * step.group, 4 * step.head_dim  # of one head
    heads = last_head - first_head
    blocks = (start + tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    queries, results = scratch, scratch + heads * rows * width
    sums = results + heads * rows * width
    scores, stride = sums + 32 * heads * rows, 4 * BLOCK_TOKENS * blocks

    take_queries(op, step, row, tokens, first_head, last_head, queries)
    for index in range(blocks):
        keys = op.keys + place_of(step, table, index, first_head)
        for head in range(heads):
            x, out = queries + head * rows * width, scores + head * rows * stride + 4 * BLOCK_TOKENS * index
            for _ in range(BLOCK_TOKENS // KEY_PANEL):
                score_rows(x, rows, step.head_dim, keys, out, stride)
                keys += KEY_PANEL * width
                out += 4 * KEY_PANEL
    for index in range(heads * rows):
        visible = start + index % rows // step.group + 1
        put(sums + 4 * index, weigh(scores + index * stride, visible, BLOCK_TOKENS * blocks))
    for at in range(results, sums, 32):
        store(at, splat(_ZERO))
    for index in range(blocks):
        values = op.values + place_of(step, table, index, first_head)
        for head in range(heads):
            x, out = scores + head * rows * stride + 4 * BLOCK_TOKENS * index, results + head * rows * width
            for _ in range(step.head_dim // VALUE_PANEL):
                weighted_rows(x, stride, rows, values, out, width)
                values += 4 * VALUE_PANEL * BLOCK_TOKENS
                out += 4 * VALUE_PANEL
    give_results(op, step, row, tokens, first_head, last_head, results, sums)


@compiled
def place_of(step: Any, table: int, index: int, head: int) -> int:
    """Where one head's part of a sequence's block begins, from the begin of all keys or values on."""
    return int((get_int(table + 4 * index) * step.kv_heads + head) * 4 * BLOCK_TOKENS * step.head_dim)


@compiled
def take_queries(op: Any, step: Any, row: int, tokens: int, first_head: int, last_head: int, queries: int) -> None:
    """The span's rotated queries, head by head, one after another and scaled."""
    scale, width = splat(step.scale), 4 * step.head_dim
    for head in range(first_head, last_head):
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
def weighted_tile(tile: Any, scores: int, stride: int, panel: int, out: int, width: int) -> None:
    store_tile(plain(load_tile(tile, out, width), scores, stride, panel, BLOCK_TOKENS), out, width)


@compiled
def weighted_rows(scores: int, stride: int, rows: int, panel: int, out: int, width: int) -> None:
    """One value panel: what a block's tokens add to 16 numbers of all rows."""
    for _ in range(rows // 6):
        weighted_tile(tile6(), scores, stride, panel, out, width)
        scores += 6 * stride
        out += 6 * width
    rest = rows % 6
    if rest == 1:
        weighted_tile(tile1(), scores, stride, panel, out, width)
    elif rest == 2:
        weighted_tile(tile2(), scores, stride, panel, out, width)
    elif rest == 3:
        weighted_tile(tile3(), scores, stride, panel, out, width)
    elif rest == 4:
        weighted_tile(tile4(), scores, stride, panel, out, width)
    elif rest == 5:
        weighted_tile(tile5(), scores, stride, panel, out, width)


@compiled
def give_results(
    op: Any, step: Any, row: int, tokens: int, first_head: int, last_head: int, results: int, sums: int
) -> None:
    """Divided by their sums, each to its token and query head."""
    width = 4 * step.head_dim
    for head in range(first_head, last_head):
        for token in range(tokens):
            for member in range(step.group):
                out = op.out + (row + token) * op.out_stride + (head * step.group + member) * width
                scale = splat(_ONE / get(sums))
                for at in range(0, width, 32):
                    store(out + at, mul(load(results + at), scale))
                results += width
                sums += 4
