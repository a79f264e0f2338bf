"""y = x W^T for any number of rows, the same bits for a row whatever rows are beside it.

Each number of y is one chain of fused multiply-adds over the inputs, in their order, whatever the number of rows, the
panel's place or the thread. So nothing has to be probed or padded. Of scaled forms (nibbles, bytes) the sums of each
block of 32 inputs are a chain of their own over the stored small numbers, then scaled: y += scale * sum(q x), and
y += minimum * sum(x), whose sums of inputs are computed once for all panels (rows.py).

Up to five rows go through, three at a time, while weights are unpacked in registers: few rows cost what reading the
weights costs. More rows share one unpacked panel, six at a time: many rows cost what the arithmetic costs.

Addresses and strides are bytes.
"""

from typing import Any

import numpy
from numba import types
from numba.extending import overload

from gpu_worker.torch_engine.kernels.functions import silu
from gpu_worker.torch_engine.kernels.vectors import (
    add_scaled,
    add_tile,
    cleared,
    compiled,
    fetch,
    load,
    load_bfloat,
    load_bytes,
    load_half,
    load_nibbles,
    load_tile,
    multiply_tile,
    outer,
    store,
    store_tile,
    tile1,
    tile2,
    tile3,
    tile4,
    tile5,
    tile6,
)
from gpu_worker.torch_engine.kernels.weights import BFLOAT, BLOCK, BYTES, FLOAT, HALF, NIBBLES, PANEL

# What to do with the sums. GATED: panels of a gate and of its up projection take turns; the result is SiLU(gate) * up.
KEEP, ADD, GATED, SILU, TIMES = range(5)  # the last two are what GATED comes to for one panel

# A form as a type, so that each form gets kernels of its own. The values mean nothing.
AS_NIBBLES, AS_BYTES, AS_HALF = numpy.uint8(0), numpy.int8(0), numpy.int16(0)
AS_BFLOAT, AS_FLOAT = numpy.uint16(0), numpy.float32(0)

ROW = 4 * PANEL  # bytes of 16 float32: one input's weights, or one row of a tile
LINE = 64  # bytes of a cache line
DIRECT_ROWS = 5
TILE_ROWS = 6


def pair(form: Any, block: int, k: int) -> Any:
    """The numbers of inputs k and k + 1 of a block, not scaled: two vectors of outputs each. k is even."""
    raise NotImplementedError("only inside compiled functions")


@overload(pair)  # type: ignore[untyped-decorator]
def _pair(form: Any, block: Any, k: Any) -> Any:
    def nibbles(form: Any, block: Any, k: Any) -> Any:
        return load_nibbles(block + 4 * PANEL + 8 * k)

    def bytes_(form: Any, block: Any, k: Any) -> Any:
        at = block + 2 * PANEL + 16 * k
        return load_bytes(at), load_bytes(at + 8), load_bytes(at + 16), load_bytes(at + 24)

    def half(form: Any, block: Any, k: Any) -> Any:
        at = block + 32 * k
        return load_half(at), load_half(at + 16), load_half(at + 32), load_half(at + 48)

    def bfloat(form: Any, block: Any, k: Any) -> Any:
        at = block + 32 * k
        return load_bfloat(at), load_bfloat(at + 16), load_bfloat(at + 32), load_bfloat(at + 48)

    def float_(form: Any, block: Any, k: Any) -> Any:
        at = block + ROW * k
        return load(at), load(at + 32), load(at + 64), load(at + 96)

    forms = {types.uint8: nibbles, types.int8: bytes_, types.int16: half, types.uint16: bfloat, types.float32: float_}
    return forms[form]


@compiled
def open_block(tile: Any, op: Any) -> Any:
    """What the sums of a block start from: of scaled forms from zero, else they go on."""
    return cleared(tile) if op.form <= BYTES else tile


@compiled
def close_block(tile: Any, part: Any, packed: int, sums: int, op: Any) -> Any:
    """The sums with those of one more block. sums: address of the first row's sum of this block's inputs."""
    if op.form > BYTES:
        return part
    tile = add_scaled(tile, part, load_half(packed), load_half(packed + 16))
    if op.form == NIBBLES:
        tile = outer(tile, sums, op.sums_stride, load_half(packed + 32), load_half(packed + 48))
    return tile


@compiled
def finish(tile: Any, out: int, stride: int, mode: int) -> None:
    """Put a tile's sums where they belong."""
    if mode == ADD:
        add_tile(tile, out, stride)
    elif mode == TIMES:
        multiply_tile(tile, out, stride)
    else:
        store_tile(tile, out, stride)
        if mode == SILU:
            for row in range(len(tile) // 2):
                for at in (out + row * stride, out + row * stride + 32):
                    store(at, silu(load(at)))


@compiled
def begin(tile: Any, bias: int) -> Any:
    """The sums start at the bias. bias: address of this panel's, or 0."""
    return load_tile(tile, bias, 0) if bias else tile


@compiled
def direct(form: Any, left: Any, right: Any, row: int, first: int, second: int, op: Any) -> Any:
    """The tiles of two panels from packed weights, for rows from `row` on: unpacked in registers, used once."""
    x, sums, ahead = op.x + row * op.x_stride, op.sums + row * op.sums_stride, 2 * op.blocks * op.block_bytes
    for _ in range(op.blocks):
        left_part, right_part = open_block(left, op), open_block(right, op)
        for k in range(0, BLOCK, 2):
            a, b, c, d = pair(form, first, k)
            left_part = outer(left_part, x, op.x_stride, a, b)
            left_part = outer(left_part, x + 4, op.x_stride, c, d)
            a, b, c, d = pair(form, second, k)
            right_part = outer(right_part, x, op.x_stride, a, b)
            right_part = outer(right_part, x + 4, op.x_stride, c, d)
            x += 8
        left = close_block(left, left_part, first, sums, op)
        right = close_block(right, right_part, second, sums, op)
        for line in range(0, op.block_bytes, LINE):  # the pair of panels after this one
            fetch(first + ahead + line)
            fetch(second + ahead + line)
        first += op.block_bytes
        second += op.block_bytes
        sums += 4
    return left, right


@compiled
def few(form: Any, tile: Any, row: int, op: Any, panel: int, last: int) -> None:
    """A panel and the next one, for as many rows from `row` on as `tile` has."""
    panel_bytes, out = op.blocks * op.block_bytes, op.out + row * op.out_stride
    twin = min(panel + 1, last - 1)  # the last panel of an odd number goes twice
    left, right = begin(tile, bias_of(op, panel)), begin(tile, bias_of(op, twin))
    left, right = direct(form, left, right, row, op.weight + panel * panel_bytes, op.weight + twin * panel_bytes, op)
    finish(left, out + column_of(op, panel), op.out_stride, mode_of(op, panel))
    if twin != panel:
        finish(right, out + column_of(op, twin), op.out_stride, mode_of(op, twin))


@compiled
def unpack_form(form: Any, packed: int, panel: int, op: Any) -> None:
    """One panel's numbers as float32."""
    for _ in range(op.blocks):
        for k in range(0, BLOCK, 2):
            a, b, c, d = pair(form, packed, k)
            store(panel, a)
            store(panel + 32, b)
            store(panel + 64, c)
            store(panel + 96, d)
            panel += 2 * ROW
        packed += op.block_bytes


@compiled
def unpack(packed: int, panel: int, op: Any) -> None:
    if op.form == NIBBLES:
        unpack_form(AS_NIBBLES, packed, panel, op)
    elif op.form == BYTES:
        unpack_form(AS_BYTES, packed, panel, op)
    elif op.form == HALF:
        unpack_form(AS_HALF, packed, panel, op)
    elif op.form == BFLOAT:
        unpack_form(AS_BFLOAT, packed, panel, op)
    elif op.form == FLOAT:
        unpack_form(AS_FLOAT, packed, panel, op)


@compiled
def plain(tile: Any, x: int, stride: int, panel: int, count: int) -> Any:
    """The tile plus the product with an unpacked panel: count inputs of 16 float32 weights."""
    for _ in range(count):
        tile = outer(tile, x, stride, load(panel), load(panel + 32))
        x += 4
        panel += ROW
    return tile


@compiled
def tile_rows(tile: Any, row: int, panel: int, packed: int, unpacked: int, op: Any) -> None:
    """One panel, for as many rows from `row` on as `tile` has."""
    tile = begin(tile, bias_of(op, panel))
    x, sums = op.x + row * op.x_stride, op.sums + row * op.sums_stride
    for _ in range(op.blocks):
        part = plain(open_block(tile, op), x, op.x_stride, unpacked, BLOCK)
        tile = close_block(tile, part, packed, sums, op)
        x += 4 * BLOCK
        unpacked += ROW * BLOCK
        packed += op.block_bytes
        sums += 4
    finish(tile, op.out + row * op.out_stride + column_of(op, panel), op.out_stride, mode_of(op, panel))


@compiled
def many(rows: int, op: Any, first: int, last: int, scratch: int) -> None:
    """Panels first..last of any number of rows, in tiles of like size; scratch: room for one unpacked panel.

    A tile of fewer than four rows takes as long as one of four: so two of four, not six and two.
    """
    for panel in range(first, last):
        packed = op.weight + panel * op.blocks * op.block_bytes
        unpack(packed, scratch, op)
        row, tiles = 0, (rows + TILE_ROWS - 1) // TILE_ROWS
        while tiles:
            count = (rows - row + tiles - 1) // tiles
            if count == 6:
                tile_rows(tile6(), row, panel, packed, scratch, op)
            elif count == 5:
                tile_rows(tile5(), row, panel, packed, scratch, op)
            elif count == 4:
                tile_rows(tile4(), row, panel, packed, scratch, op)
            elif count == 3:
                tile_rows(tile3(), row, panel, packed, scratch, op)
            elif count == 2:
                tile_rows(tile2(), row, panel, packed, scratch, op)
            else:
                tile_rows(tile1(), row, panel, packed, scratch, op)
            row += count
            tiles -= 1


@compiled
def bias_of(op: Any, panel: int) -> int:
    return op.bias + ROW * panel if op.bias else 0


@compiled
def column_of(op: Any, panel: int) -> int:
    """Bytes from a row's begin to where a panel's sums go. Gate and up panels take turns, for the same columns."""
    return ROW * (panel // 2 if op.mode == GATED else panel)


@compiled
def mode_of(op: Any, panel: int) -> int:
    if op.mode != GATED:
        return int(op.mode)
    return TIMES if panel % 2 else SILU


@compiled
def few_rows(form: Any, rows: int, op: Any, first: int, last: int) -> None:
    for panel in range(first, last, 2):
        row = 0
        while row < rows:
            left = rows - row
            if left == 1:
                few(form, tile1(), row, op, panel, last)
                row += 1
            elif left == 2 or left == 4:
                few(form, tile2(), row, op, panel, last)
                row += 2
            else:
                few(form, tile3(), row, op, panel, last)
                row += 3


@compiled
def multiply(rows: int, op: Any, first: int, last: int, scratch: int) -> None:
    """Panels first..last of `op`, for all rows. Pairs of panels must not be torn apart: first is even."""
    if rows > DIRECT_ROWS or op.form == FLOAT:
        many(rows, op, first, last, scratch)
    elif op.form == NIBBLES:
        few_rows(AS_NIBBLES, rows, op, first, last)
    elif op.form == BYTES:
        few_rows(AS_BYTES, rows, op, first, last)
    elif op.form == HALF:
        few_rows(AS_HALF, rows, op, first, last)
    elif op.form == BFLOAT:
        few_rows(AS_BFLOAT, rows, op, first, last)
