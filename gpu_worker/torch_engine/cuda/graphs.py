"""Decode steps as recorded graphs: a step is hundreds of short kernels, and launching each from Python takes longer
than they run. A graph is launched as one.

A graph reads and writes fixed memory, so each has its number of rows, and the inputs lie in buffers that all of them
share. A batch of n decode rows takes the graph of the next larger number; rows of padding are a token 0 at position 0
that is stored in the null block and sees only itself. What depends on the context's length in a kernel's launch (into
how many parts it is split) is fixed for the longest.

    host batch --one copy--> buffers (tokens, positions, slots | lengths, key starts, block table)
                              | replay
                              v
                             hidden (rows of the graph, D): valid until the next replay

Steps with prompt chunks or drafts run operation by operation: there the kernels are long.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.cuda.paged import Call, PagedAttention, ends
from gpu_worker.torch_engine.model import Decoder

WARM_UP_RUNS = 3  # before a capture: libraries choose algorithms and take memory in their first calls


@dataclasses.dataclass(frozen=True)
class Recorded:
    """replay: compute anew from the buffers into `output`, without waiting."""

    replay: Callable[[], None]
    output: Tensor


Capture = Callable[[Callable[[], Tensor]], Recorded]


def bucket_sizes(capacity: int) -> list[int]:
    """Rows of each graph, the last for `capacity`. Few rows cost about as much as the next few."""
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, capacity, 32))
    return [*(rows for rows in steps if rows < capacity), capacity]


def choose_bucket(rows: int, sizes: list[int]) -> int | None:
    return next((size for size in sizes if size >= rows), None)


def cuda_capture() -> Capture:
    """Captures on this GPU into one pool: of graphs that share it, only the last replayed one's output is valid."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> Recorded:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's stubs have no types for it
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = run()
        return Recorded(graph.replay, output)

    return capture


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a decode step reads, as views of one buffer, so that one copy fills them."""

    tokens: Tensor  # (capacity,) int64
    positions: Tensor  # (capacity,) int64
    slots: Tensor  # (capacity,) int64
    lengths: Tensor  # (capacity,) int32
    key_starts: Tensor  # (capacity + 1,) int32
    block_table: Tensor  # (capacity, width) int32

    @classmethod
    def size(cls, capacity: int, width: int) -> int:
        """int64 numbers of the buffer."""
        return 3 * capacity + -(-(capacity + capacity + 1 + capacity * width) // 2)

    @classmethod
    def carve(cls, buffer: Tensor, capacity: int, width: int) -> Self:
        tokens, positions, slots = buffer[: 3 * capacity].view(3, capacity)
        rest = buffer[3 * capacity :].view(torch.int32)
        lengths, key_starts = rest[:capacity], rest[capacity : 2 * capacity + 1]
        table = rest[2 * capacity + 1 :][: capacity * width].view(capacity, width)
        return cls(tokens, positions, slots, lengths, key_starts, table)


class GraphDecoder:
    """A decoder over all layers whose decode steps are replayed."""

    def __init__(
        self, decoder: Decoder, attention: PagedAttention, *, capacity: int, context: int, capture: Capture
    ) -> None:
        """context: positions that a sequence may reach. capacity: decode rows of one step, at most."""
        self.kind = f"{decoder.kind}, graphs"
        self.block_tokens = decoder.block_tokens
        self.decoder = decoder
        self.logits = decoder.logits
        self.clear = decoder.clear
        self.sizes = bucket_sizes(capacity)
        self._attention = attention
        self._capacity = capacity
        self._context = context
        self._width = -(-context // attention.block_tokens)
        self._buffer = torch.zeros(Inputs.size(capacity, self._width), dtype=torch.int64, device=attention.device)
        self._inputs = Inputs.carve(self._buffer, capacity, self._width)
        self._inputs.lengths.fill_(1)
        self._inputs.key_starts.copy_(ends(self._inputs.lengths))
        with torch.inference_mode():  # the largest first: the others then fit into its memory
            self._recorded = {size: capture(partial(self._run, self._step_of(size))) for size in reversed(self.sizes)}

    def forward(self, batch: Batch) -> Tensor:
        size = choose_bucket(batch.rows, self.sizes)
        if size is None or batch.rows > len(batch.pieces):
            return self.decoder.forward(batch)
        self._fill(batch)
        recorded = self._recorded[size]
        recorded.replay()
        return recorded.output[: batch.rows]

    def _fill(self, batch: Batch) -> None:
        """One copy, and one more for tokens that the step before left on the device."""
        rows = batch.rows
        on_gpu = self._buffer.is_cuda
        buffer = torch.zeros(self._buffer.shape, dtype=torch.int64, pin_memory=on_gpu)
        inputs = Inputs.carve(buffer, self._capacity, self._width)
        inputs.positions[:rows] = batch.positions
        inputs.slots[:rows] = batch.slots
        inputs.lengths[:rows] = batch.lengths
        inputs.lengths[rows:] = 1
        inputs.key_starts.copy_(ends(inputs.lengths))
        inputs.block_table[:rows, : batch.block_table.shape[1]] = batch.block_table
        if not batch.tokens.is_cuda:
            inputs.tokens[:rows] = batch.tokens
        self._buffer.copy_(buffer, non_blocking=True)
        if batch.tokens.is_cuda:
            self._inputs.tokens[:rows].copy_(batch.tokens)

    def _step_of(self, rows: int) -> Call:
        inputs = self._inputs
        return Call(
            rows=slice(0, rows),
            row_starts=torch.arange(rows + 1, dtype=torch.int32, device=self._buffer.device),
            key_starts=inputs.key_starts[: rows + 1],
            lengths=inputs.lengths[:rows],
            block_table=inputs.block_table[:rows],
            rows_max=1,
            length_max=self._context,
        )

    def _run(self, call: Call) -> Tensor:
        inputs, rows = self._inputs, call.rows
        step = self._attention.step(inputs.positions[rows], inputs.slots[rows], [call])
        return self.decoder.run_layers(self.decoder.embed(inputs.tokens[rows]), step)
