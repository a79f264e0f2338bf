"""A range of a model's layers as a program for the kernels. The same numbers as model.py's Decoder, in float32."""

import contextlib
import dataclasses
import math
import mmap
import weakref
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.kernels.attention import scratch_bytes, span_tokens
from gpu_worker.torch_engine.kernels.operations import (
    HeadBuffers,
    LayerBuffers,
    Program,
    head_operations,
    layer_operations,
)
from gpu_worker.torch_engine.kernels.program import STEP, Team, address
from gpu_worker.torch_engine.kernels.rows import BLOCK_TOKENS
from gpu_worker.torch_engine.kernels.weights import BLOCK, PANEL, PackedWeight
from gpu_worker.torch_engine.model import ModelWeights
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.rope import rotary_tables

ROOM_ROWS = 64  # buffers grow by so many rows

Array = numpy.ndarray[Any, Any]


def supports(config: ModelConfig) -> bool:
    """Whether the kernels can compute this shape: panels and blocks must come out whole."""
    widths = (config.hidden, config.intermediate, config.heads * config.head_dim)
    return all(width % BLOCK == 0 for width in widths) and config.head_dim % PANEL == 0


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A batch as the kernels want it; int32 each."""

    rows: int
    positions: Array  # (rows,)
    slots: Array  # (rows,)
    spans: Array  # (spans, SPAN_FIELDS)
    block_table: Array  # (pieces, width)


class CompiledDecoder:
    """Layers with their keys and values.

    A layer's keys lie as (blocks, kv_heads, BLOCK_TOKENS / 16, head_dim, 16 tokens), its values as
    (blocks, kv_heads, head_dim / 16, BLOCK_TOKENS, 16 numbers): each block is panels of a product's weights.
    """

    kind = "compiled"
    block_tokens = BLOCK_TOKENS

    def __init__(
        self, config: ModelConfig, weights: ModelWeights[PackedWeight], *, blocks: int, context: int, threads: int
    ) -> None:
        """blocks: besides the null block. context: positions that a sequence may reach."""
        self.config = config
        self._layers = weights.layers
        self.embedding, self._norm, self._head = weights.embedding, weights.norm, weights.head
        shape = (blocks + 1, config.kv_heads, BLOCK_TOKENS * config.head_dim)
        self._keys = [small_pages(shape) for _ in self._layers]
        self._values = [small_pages(shape) for _ in self._layers]
        cos, sin = rotary_tables(config, context, torch.device("cpu"), torch.float32)
        self._rotary = cos.shape[1]
        half = self._rotary // 2
        self._cos, self._sin = cos[:, :half].contiguous().numpy(), sin[:, half:].contiguous().numpy()
        widest = max(config.hidden, config.intermediate, config.heads * config.head_dim)
        self._team = Team(
            threads, max(4 * PANEL * widest, scratch_bytes(config.heads, config.group, config.head_dim, context))
        )
        weakref.finalize(self, self._team.close)
        self._buffers, self._program = LayerBuffers(config, 0), self._program_of([])
        self._head_buffers: HeadBuffers | None = None
        self._head_program = self._program_of([])
        self._step = self._unchanging()

    def plan(self, batch: Batch) -> CompiledStep:
        tokens = span_tokens(self.config.group)
        spans = [
            (row, min(tokens, end - row), piece.start + row - piece.first_row, index)
            for index, piece in enumerate(batch.pieces)
            for end in (piece.first_row + piece.count,)
            for row in range(piece.first_row, end, tokens)
        ]
        return CompiledStep(
            batch.rows,
            batch.positions.numpy().astype(numpy.int32),
            batch.slots.numpy().astype(numpy.int32),
            numpy.array(spans, numpy.int32),
            batch.block_table.numpy(),
        )

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states (T, D), in a buffer that the next call overwrites."""
        return self.run_layers(self.embed(batch.tokens), self.plan(batch))

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D). Only for a range that holds the first layer."""
        assert self.embedding is not None
        if isinstance(self.embedding, Tensor):
            return functional.embedding(tokens, self.embedding).float()
        return self.embedding.rows(tokens)

    def run_layers(self, hidden: Tensor, step: CompiledStep) -> Tensor:
        """(T, D) -> (T, D) through the layers of this range, float32; the result lies in a buffer, see forward."""
        if step.rows > self._buffers.rows:
            self._buffers = LayerBuffers(self.config, -(-step.rows // ROOM_ROWS) * ROOM_ROWS)
            self._program = self._program_of(self._layer_operations())
        held = torch.from_numpy(self._buffers.hidden)[: step.rows]
        held.copy_(hidden)
        self._program.set_rows(step.rows, len(step.spans))
        self._team.run(self._program.records, self._record_of(step))
        return held

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V), in a buffer that the next call overwrites. Only if the last layer is here."""
        assert self._norm is not None and self._head is not None
        rows = hidden.shape[0]
        if self._head_buffers is None or rows > self._head_buffers.rows:
            self._head_buffers = HeadBuffers(self.config, self._head, rows)
            operations = head_operations(self._norm, self._head, self._head_buffers, self._team.threads)
            self._head_program = self._program_of(operations)
        torch.from_numpy(self._head_buffers.hidden)[:rows].copy_(hidden)
        self._head_program.set_rows(rows, 0)
        self._step["rows"] = rows
        self._team.run(self._head_program.records, self._step)
        return torch.from_numpy(self._head_buffers.logits)[:rows, : self._head.outputs]

    def clear(self, blocks: list[int]) -> None:
        for cache in (*self._keys, *self._values):
            cache[blocks] = 0

    def _program_of(self, operations: list[Any]) -> Program:
        return Program(operations, kv_heads=self.config.kv_heads, threads=self._team.threads)

    def _layer_operations(self) -> list[Any]:
        return [
            operation
            for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True)
            for operation in layer_operations(layer, self._buffers, keys, values, self._team.threads)
        ]

    def _unchanging(self) -> Array:
        """What is the same in each step."""
        config = self.config
        record = numpy.zeros(1, STEP)
        record["heads"], record["kv_heads"], record["group"] = config.heads, config.kv_heads, config.group
        record["head_dim"], record["rotary"] = config.head_dim, self._rotary
        record["cos"], record["sin"] = address(self._cos), address(self._sin)
        record["scale"] = config.head_dim**-0.5
        return record

    def _record_of(self, step: CompiledStep) -> Array:
        """`step` must live until the record was used."""
        record = self._step
        record["rows"] = step.rows
        record["positions"], record["slots"] = address(step.positions), address(step.slots)
        record["spans"], record["block_table"] = address(step.spans), address(step.block_table)
        record["table_width"] = step.block_table.shape[1]
        return record


def small_pages(shape: tuple[int, ...]) -> Array:
    """Zeros, float32, that the system gives out page by page as they are written: a large pool is free until used.

    NumPy asks for pages of 2 MiB. There, attention over many sequences takes nearly twice as long: the blocks that are
    read at the same time in all layers' caches fall on the same few places of the processor's caches.
    Raises OSError if there is not that much to give out.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a kernel that knows no other pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return numpy.frombuffer(memory, numpy.float32).reshape(shape)
