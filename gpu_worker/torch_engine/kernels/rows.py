"""What is done row by row: RMS norms, rotary positions, and keys and values put into their blocks."""

from typing import Any

import numpy

from gpu_worker.torch_engine.kernels.functions import total
from gpu_worker.torch_engine.kernels.vectors import (
    add,
    compiled,
    fma,
    get,
    get_int,
    load,
    mul,
    put,
    splat,
    store,
    sub,
)

KEY_PANEL = 16  # tokens: keys lie as a product wants its weights, so that scores are one
VALUE_PANEL = 16  # numbers of a head
BLOCK_TOKENS = 32


@compiled
def norm(x: int, weight: int, out: int, width: int, epsilon: Any) -> None:
    """out = x / sqrt(mean(x^2) + epsilon) * weight, for `width` numbers, a multiple of 8. out may be x."""
    squares = splat(numpy.float32(0.0))
    for at in range(0, 4 * width, 32):
        squares = fma(load(x + at), load(x + at), squares)
    mean = total(squares) / numpy.float32(width)
    scale = splat(numpy.float32(1.0) / numpy.sqrt(mean + epsilon))
    for at in range(0, 4 * width, 32):
        store(out + at, mul(mul(load(x + at), scale), load(weight + at)))


@compiled
def norm_rows(op: Any, first: int, last: int) -> None:
    for row in range(first, last):
        norm(op.x + row * op.x_stride, op.weight, op.out + row * op.out_stride, op.inputs, op.epsilon)


@compiled
def rotate(x: int, cos: int, sin: int, rotary: int) -> None:
    """Rotary positions on the first `rotary` numbers of a head, a multiple of 16; halves rotate together."""
    half = 2 * rotary  # bytes
    for at in range(0, half, 32):
        a, b = load(x + at), load(x + half + at)
        c, s = load(cos + at), load(sin + at)
        store(x + at, sub(mul(a, c), mul(b, s)))
        store(x + half + at, fma(b, c, mul(a, s)))


@compiled
def put_key(x: int, block: int, place: int, head_dim: int) -> None:
    """One head's key into a block of one head: (2 panels, head_dim, 16 tokens), as a product wants its weights."""
    to = block + (place // KEY_PANEL) * head_dim * 4 * KEY_PANEL + 4 * (place % KEY_PANEL)
    for index in range(head_dim):
        put(to + 4 * KEY_PANEL * index, get(x + 4 * index))


@compiled
def put_value(x: int, block: int, place: int, head_dim: int) -> None:
    """One head's value into a block of one head: (head_dim / 16 panels, BLOCK_TOKENS, 16 numbers)."""
    for panel in range(head_dim // VALUE_PANEL):
        to = block + (panel * BLOCK_TOKENS + place) * 4 * VALUE_PANEL
        store(to, load(x))
        store(to + 32, load(x + 32))
        x += 4 * VALUE_PANEL


@compiled
def place_row(op: Any, step: Any, row: int) -> None:
    """One token: rotate its queries and keys in place, and copy its keys and values into its block."""
    x, head = op.x + row * op.x_stride, 4 * step.head_dim
    position = get_int(step.positions + 4 * row)
    cos, sin = step.cos + position * 2 * step.rotary, step.sin + position * 2 * step.rotary
    for index in range(step.heads + step.kv_heads):
        here = x + index * head
        if op.query_norm:
            weight = op.query_norm if index < step.heads else op.key_norm
            norm(here, weight, here, step.head_dim, op.epsilon)
        rotate(here, cos, sin, step.rotary)
    block, place = divmod(get_int(step.slots + 4 * row), BLOCK_TOKENS)
    for index in range(step.kv_heads):
        keys = x + (step.heads + index) * head
        base = (block * step.kv_heads + index) * BLOCK_TOKENS * head
        put_key(keys, op.keys + base, place, step.head_dim)
        put_value(keys + step.kv_heads * head, op.values + base, place, step.head_dim)


@compiled
def place_rows(op: Any, step: Any, first: int, last: int) -> None:
    for row in range(first, last):
        place_row(op, step, row)


@compiled
def sum_rows(op: Any, first: int, last: int) -> None:
    """The sums of each 32 inputs, of each row: what minima are multiplied by."""
    for row in range(first, last):
        x, out = op.x + row * op.x_stride, op.out + row * op.out_stride
        for _ in range(op.inputs // 32):
            put(out, total(add(add(load(x), load(x + 32)), add(load(x + 64), load(x + 96)))))
            x += 128
            out += 4
