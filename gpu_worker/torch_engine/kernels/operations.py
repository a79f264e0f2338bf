"""The operations of a decoder, as records for program.py: which numbers go where. The arrays named must live on."""

from typing import Any

import numpy

from gpu_worker.torch_engine.kernels.products import ADD, GATED, KEEP
from gpu_worker.torch_engine.kernels.program import (
    ATTEND,
    NORM,
    OPERATION,
    PLACE,
    PRODUCT,
    SUM,
    address,
    aligned,
)
from gpu_worker.torch_engine.kernels.weights import BLOCK, BLOCK_BYTES, NIBBLES, PANEL, PackedWeight
from gpu_worker.torch_engine.model import LayerWeights
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.norm import RmsNorm

CLAIMS = 16  # a product is claimed in about so many parts: few enough to cost nothing, many enough to end together
# From so many spans a thread on, all heads of one are a unit: a block's keys lie together and are read in one go, which
# memory does twice as fast as 8 KiB here and there. Fewer are split by heads, so that the threads end together.
SPANS_WHOLE = 2

Array = numpy.ndarray[Any, Any]


class LayerBuffers:
    """The rows between operations; float32."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        self.rows = rows
        attended = config.heads * config.head_dim
        self.hidden = matrix(rows, config.hidden)
        self.normed = matrix(rows, config.hidden)
        self.qkv = matrix(rows, attended + 2 * config.kv_heads * config.head_dim)
        self.attended = matrix(rows, attended)
        self.middle = matrix(rows, config.intermediate)
        self.sums = matrix(rows, max(config.hidden, config.intermediate, attended) // BLOCK)


class HeadBuffers:
    def __init__(self, config: ModelConfig, head: PackedWeight, rows: int) -> None:
        self.rows = rows
        self.hidden = matrix(rows, config.hidden)
        self.normed = matrix(rows, config.hidden)
        self.sums = matrix(rows, config.hidden // BLOCK)
        self.logits = matrix(rows, head.panels * PANEL)


def layer_operations(
    layer: LayerWeights[PackedWeight], b: LayerBuffers, keys: Array, values: Array, threads: int
) -> list[Any]:
    """gate_up: interleaved. keys, values: this layer's blocks."""
    place, attend = operation(PLACE, b.qkv, b.qkv), operation(ATTEND, b.qkv, b.attended)
    for record in (place, attend):
        record["keys"], record["values"] = address(keys), address(values)
    if layer.query_norm is not None and layer.key_norm is not None:
        place["query_norm"], place["key_norm"] = weight_of(layer.query_norm), weight_of(layer.key_norm)
        place["epsilon"] = layer.query_norm.eps
    return [
        norm_operation(layer.attention_norm, b.hidden, b.normed),
        *product_operations(layer.qkv, b.normed, b.qkv, KEEP, b.sums, threads),
        place,
        attend,
        *product_operations(layer.output, b.attended, b.hidden, ADD, b.sums, threads),
        norm_operation(layer.mlp_norm, b.hidden, b.normed),
        *product_operations(layer.gate_up, b.normed, b.middle, GATED, b.sums, threads),
        *product_operations(layer.down, b.middle, b.hidden, ADD, b.sums, threads),
    ]


def head_operations(norm: RmsNorm, head: PackedWeight, b: HeadBuffers, threads: int) -> list[Any]:
    return [
        norm_operation(norm, b.hidden, b.normed),
        *product_operations(head, b.normed, b.logits, KEEP, b.sums, threads),
    ]


def operation(kind: int, x: Array, out: Array) -> Any:
    record = numpy.zeros((), OPERATION)
    record["kind"] = kind
    record["x"], record["x_stride"] = address(x), x.strides[0]
    record["out"], record["out_stride"] = address(out), out.strides[0]
    return record


def norm_operation(norm: RmsNorm, x: Array, out: Array) -> Any:
    record = operation(NORM, x, out)
    record["weight"], record["inputs"], record["epsilon"] = weight_of(norm), norm.width, norm.eps
    return record


def weight_of(norm: RmsNorm) -> int:
    """Address."""
    return norm.weight.data_ptr()


def product_operations(weight: PackedWeight, x: Array, out: Array, mode: int, sums: Array, threads: int) -> list[Any]:
    """The product and, if its form has minima, the sums that they are multiplied by."""
    record = operation(PRODUCT, x, out)
    record["weight"], record["form"], record["mode"] = address(weight.data), weight.form, mode
    record["blocks"], record["block_bytes"] = weight.blocks, BLOCK_BYTES[weight.form]
    record["bias"] = 0 if weight.bias is None else address(weight.bias)
    record["units"] = weight.panels
    record["chunk"] = 2 * claim_of(-(-weight.panels // 2), threads)  # pairs of panels stay together
    if weight.form != NIBBLES:
        return [record]
    record["sums"], record["sums_stride"] = address(sums), sums.strides[0]
    before = operation(SUM, x, sums)
    before["inputs"] = weight.inputs
    return [before, record]


class Program:
    """Operations in their order, and how much each has to do in a step."""

    def __init__(self, operations: list[Any], *, kv_heads: int, threads: int) -> None:
        self.records = numpy.array(operations, OPERATION)
        self._kv_heads = kv_heads
        self._threads = threads
        kinds = self.records["kind"] if operations else numpy.zeros(0)
        self._by_row = numpy.flatnonzero(numpy.isin(kinds, (NORM, SUM, PLACE)))
        self._by_span = numpy.flatnonzero(kinds == ATTEND)

    def set_rows(self, rows: int, spans: int) -> None:
        """For a step of so many rows. spans: of its attention, whose heads may be several units."""
        whole = self._threads == 1 or spans >= SPANS_WHOLE * self._threads
        heads = self._kv_heads if whole else 1
        self.records["heads"][self._by_span] = heads
        for places, units in ((self._by_row, rows), (self._by_span, spans * (self._kv_heads // heads))):
            self.records["units"][places] = units
            self.records["chunk"][places] = claim_of(units, self._threads)


def claim_of(units: int, threads: int) -> int:
    """Units that a thread claims at once."""
    return max(1, units if threads == 1 else -(-units // CLAIMS))


def matrix(rows: int, width: int) -> Array:
    return aligned(4 * rows * width).view(numpy.float32).reshape(rows, width)
