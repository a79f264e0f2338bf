"""A Llama-family decoder over a flat batch, or any contiguous range of its layers.

Nothing here knows of requests or of where keys and values lie: tokens in, logits out, and attention is the backend's
(attention.py). Residuals, norms and products are each one line.
Shapes: T rows of the batch, D hidden, H heads, K key/value heads, d head_dim, V vocabulary.
"""

import dataclasses
import math
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import Attention, AttentionStep
from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.linear import Linear, pad_rows
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.norm import RmsNorm
from gpu_worker.torch_engine.ops import PLAIN, Ops
from gpu_worker.torch_engine.quantized import Quantized, Weight
from gpu_worker.torch_engine.transfer import send


class HeldMatrix(Protocol):
    """One weight matrix, in the form that its backend multiplies with: Linear or PackedWeight."""

    @property
    def kind(self) -> str: ...  # for the log

    @property
    def weight_bytes(self) -> int: ...


Matrix = TypeVar("Matrix", bound=HeldMatrix)


@dataclasses.dataclass(frozen=True)
class LayerWeights(Generic[Matrix]):
    """One decoder layer; query/key/value and gate/up are fused, so each is one product."""

    attention_norm: RmsNorm  # over D
    qkv: Matrix  # D -> (H + 2K) d
    query_norm: RmsNorm | None  # over d, Qwen3
    key_norm: RmsNorm | None
    output: Matrix  # H d -> D
    mlp_norm: RmsNorm
    gate_up: Matrix  # D -> 2 * intermediate
    down: Matrix  # intermediate -> D


@dataclasses.dataclass(frozen=True)
class ModelWeights(Generic[Matrix]):
    """`embedding` is there if the range holds the first layer; `norm` and `head` if it holds the last."""

    layers: tuple[LayerWeights[Matrix], ...]
    embedding: Weight | None  # (V, D), in whatever form holds it exactly
    norm: RmsNorm | None
    head: Matrix | None  # D -> V

    @property
    def bytes_read(self) -> int:
        """Of weights, by a step that decodes."""
        matrices = [one for w in self.layers for one in (w.qkv, w.output, w.gate_up, w.down)]
        return sum(one.weight_bytes for one in (*matrices, self.head) if one is not None)


class Model(Protocol):
    """What a step needs of a model, whatever computes it: tokens of a batch in, logits of some of its rows out."""

    kind: str  # for the log
    block_tokens: int  # of one block of keys and values

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states (T, D) of all rows; their keys and values are written on the way."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V) float32."""

    def clear(self, blocks: list[int]) -> None:
        """Keys and values back to zero: a masked one has weight 0, but 0 times infinity would reach the next owner."""


class Decoder:
    """In torch, on any device: all layers, or a contiguous range of them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights[Linear],
        attention: Attention,
        *,
        dtype: torch.dtype,
        ops: Ops = PLAIN,
    ) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention
        self.kind = attention.kind
        self.block_tokens = attention.block_tokens
        self.clear = attention.clear
        self.dtype = dtype
        self._ops = ops
        self._row_multiple = row_multiple(weights)

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D). Only for a range that holds the first layer."""
        assert self.weights.embedding is not None
        embedding = self.weights.embedding
        if isinstance(embedding, Quantized):
            return embedding.rows(send(tokens, embedding.scale.device)).to(self.dtype)
        return functional.embedding(send(tokens, embedding.device), embedding).to(self.dtype)

    def forward(self, batch: Batch) -> Tensor:
        return self.run_layers(self.embed(batch.tokens), self.attention.plan(batch))

    def run_layers(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """(T, D) -> (T, D) through the layers of this range; keys and values are written on the way."""
        rows = hidden.shape[0]
        hidden = pad_rows(hidden, self._row_multiple)
        layers = self.weights.layers
        normed = layers[0].attention_norm(hidden)
        for index, (layer, following) in enumerate(zip_longest(layers, layers[1:])):
            hidden, normed = self._ops.add_norm(self._attention(normed, index, layer, step), hidden, layer.mlp_norm)
            delta = self._mlp(normed, layer)
            if following is None:
                return delta.add_(hidden)[:rows]
            hidden, normed = self._ops.add_norm(delta, hidden, following.attention_norm)
        raise AssertionError("a range of no layers")

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V) float32. Only for a range that holds the last layer."""
        assert self.weights.norm is not None and self.weights.head is not None
        return self.weights.head(self.weights.norm(hidden)).float()

    def _attention(self, normed: Tensor, index: int, layer: LayerWeights[Linear], step: AttentionStep) -> Tensor:
        config = self.config
        qkv = layer.qkv(normed).view(-1, config.heads + 2 * config.kv_heads, config.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, : config.heads], qkv[:, config.heads : -config.kv_heads]
            queries.copy_(layer.query_norm(queries))
            keys.copy_(layer.key_norm(keys))
        return layer.output(pad_rows(step.attend(index, qkv), self._row_multiple))

    def _mlp(self, normed: Tensor, layer: LayerWeights[Linear]) -> Tensor:
        return layer.down(self._ops.gated_silu(layer.gate_up(normed)))


def row_multiple(weights: ModelWeights[Linear]) -> int:
    """What the layers' products want their rows padded to: done once a step, not before each."""
    products = [one for w in weights.layers for one in (w.qkv, w.output, w.gate_up, w.down)]
    return math.lcm(*(product.row_multiple or 1 for product in products))
