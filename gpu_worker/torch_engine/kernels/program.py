"""A step as a list of operations, which several threads work through together without the GIL.

Each operation is cut into units. Whoever is free claims the next few; nobody begins an operation before all units
of the one before are done. A helper that comes late, because its core is busy with something else, finds less to do
and holds nobody up: only a thread that has claimed units is waited for.

The bits do not depend on who did what: a unit's numbers are its own.
"""

import queue
import threading
from typing import Any

import numpy

from gpu_worker.torch_engine.kernels.attention import attend
from gpu_worker.torch_engine.kernels.products import multiply
from gpu_worker.torch_engine.kernels.rows import norm_rows, place_rows, sum_rows
from gpu_worker.torch_engine.kernels.vectors import claim, compiled, step_aside, watch

NORM, SUM, PRODUCT, PLACE, ATTEND = range(5)

Array = numpy.ndarray[Any, Any]

# One operation. Addresses and strides are bytes; which fields count depends on `kind`.
OPERATION = numpy.dtype(
    [
        ("kind", "i8"),
        ("units", "i8"),  # rows, panels, or spans times parts of their heads
        ("chunk", "i8"),  # units claimed at once
        ("x", "i8"),
        ("x_stride", "i8"),
        ("out", "i8"),
        ("out_stride", "i8"),
        ("weight", "i8"),  # of a norm or a product
        ("inputs", "i8"),
        ("form", "i8"),
        ("blocks", "i8"),
        ("block_bytes", "i8"),
        ("bias", "i8"),
        ("mode", "i8"),
        ("sums", "i8"),  # (rows, blocks) float32, of forms with minima
        ("sums_stride", "i8"),
        ("keys", "i8"),
        ("values", "i8"),
        ("heads", "i8"),  # key/value heads of one unit
        ("query_norm", "i8"),
        ("key_norm", "i8"),
        ("epsilon", "f4"),
        ("_", "f4"),
    ],
    align=True,
)

# What all operations of a step share.
STEP = numpy.dtype(
    [
        ("rows", "i8"),
        ("heads", "i8"),
        ("kv_heads", "i8"),
        ("group", "i8"),  # query heads per key/value head
        ("head_dim", "i8"),
        ("rotary", "i8"),  # numbers of a head that rotate
        ("cos", "i8"),  # (context, rotary / 2) float32
        ("sin", "i8"),
        ("positions", "i8"),  # (rows,) int32
        ("slots", "i8"),  # (rows,) int32: block * BLOCK_TOKENS + place in it
        ("spans", "i8"),  # (spans, SPAN_FIELDS) int32
        ("block_table", "i8"),  # (pieces, table_width) int32
        ("table_width", "i8"),
        ("scale", "f4"),
        ("_", "f4"),
    ],
    align=True,
)

COUNTER_BYTES = 64  # two counters and nothing else in a cache line: units claimed, units done
SPINS = 200  # looks at a counter before the core is offered to others


@compiled
def perform(op: Any, step: Any, first: int, last: int, scratch: int) -> None:
    if op.kind == PRODUCT:
        multiply(step.rows, op, first, last, scratch)
    elif op.kind == NORM:
        norm_rows(op, first, last)
    elif op.kind == SUM:
        sum_rows(op, first, last)
    elif op.kind == PLACE:
        place_rows(op, step, first, last)
    else:
        attend(op, step, first, last, scratch)


@compiled
def work_through(program: Array, step: Array, counters: int, scratch: int) -> None:
    """Take part in every operation, in order; returns when all are done."""
    for index in range(len(program)):
        op = program[index]
        counter = counters + index * COUNTER_BYTES
        while True:
            first = claim(counter, op.chunk)
            if first >= op.units:
                break
            last = min(first + op.chunk, op.units)
            perform(op, step[0], first, last, scratch)
            claim(counter + 8, last - first)
        looks = 0
        while watch(counter + 8) < op.units:
            looks += 1
            if looks > SPINS:
                step_aside()


@compiled
def help_through(program: Array, step: Array, counters: int, scratch: int, gate: int, turn: int) -> None:
    """Like work_through, if turn `turn` is still open. gate: address of (open turn, threads inside)."""
    claim(gate + 8, 1)
    if claim(gate, 0) == turn:
        work_through(program, step, counters, scratch)
    claim(gate + 8, -1)


@compiled
def close_turn(gate: int) -> None:
    """Wait until no helper is inside; none enters any more."""
    claim(gate, 1)
    looks = 0
    while claim(gate + 8, 0) > 0:
        looks += 1
        if looks > SPINS:
            step_aside()


class Team:
    """The calling thread and `threads - 1` helpers. One program at a time; only one thread may call `run`."""

    def __init__(self, threads: int, scratch_bytes: int) -> None:
        self.threads = threads
        self._scratch = [aligned(scratch_bytes) for _ in range(threads)]
        self._counters = aligned(0)
        self._gate = aligned(2 * 8).view(numpy.int64)
        self._turns: queue.SimpleQueue[tuple[Array, Array, Array, int] | None] = queue.SimpleQueue()
        for index in range(1, threads):
            name = f"kernels-{index}"
            threading.Thread(target=self._help, args=(self._scratch[index],), name=name, daemon=True).start()

    def run(self, program: Array, step: Array) -> None:
        """program: (operations,) of OPERATION; step: (1,) of STEP. All memory they name must live until the end."""
        if self._counters.nbytes < COUNTER_BYTES * len(program):
            self._counters = aligned(COUNTER_BYTES * len(program))
        self._counters[:] = 0
        turn = int(self._gate[0])
        for _ in range(1, self.threads):
            self._turns.put((program, step, self._counters, turn))
        work_through(program, step, address(self._counters), address(self._scratch[0]))
        close_turn(address(self._gate))

    def close(self) -> None:
        for _ in range(1, self.threads):
            self._turns.put(None)

    def help_once(self) -> None:
        """A helper's way through a turn that is over: nothing, but compiled."""
        self._take_part(numpy.zeros(0, OPERATION), numpy.zeros(1, STEP), self._counters, -1, self._scratch[0])

    def _help(self, scratch: Array) -> None:
        while (turn := self._turns.get()) is not None:
            self._take_part(*turn, scratch)

    def _take_part(self, program: Array, step: Array, counters: Array, turn: int, scratch: Array) -> None:
        help_through(program, step, address(counters), address(scratch), address(self._gate), turn)


def aligned(size: int) -> Array:
    """`size` zero bytes that begin at a cache line. Pages cost memory once they are written."""
    raw = numpy.zeros(size + 64, numpy.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def address(array: Array) -> int:
    return int(array.ctypes.data)
