"""A Llama-family decoder over a flat batch, or any contiguous range of its layers.

Nothing here knows of requests or of where keys and values lie: tokens in, logits out, and attention is the backend's
(attention.py). Residuals, norms and products are each one line.
Shapes: T rows of the batch, D hidden, H heads, K key/value heads, d head_dim, V vocabulary.
"""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import Attention, AttentionStep
from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.linear import Linear, pad_rows
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.norm import RmsNorm
from gpu_worker.torch_engine.quantized import Quantized, Weight


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; query/key/value and gate/up are fused, so each is one product."""

    attention_norm: RmsNorm  # over D
    qkv: Linear  # D -> (H + 2K) d
    query_norm: RmsNorm | None  # over d, Qwen3
    key_norm: RmsNorm | None
    output: Linear  # H d -> D
    mlp_norm: RmsNorm
    gate_up: Linear  # D -> 2 * intermediate
    down: Linear  # intermediate -> D


@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """`embedding` is there if the range holds the first layer; `norm` and `head` if it holds the last."""

    layers: tuple[LayerWeights, ...]
    embedding: Weight | None  # (V, D), in whatever form holds it exactly
    norm: RmsNorm | None
    head: Linear | None  # D -> V

    @property
    def row_multiple(self) -> int:
        """What the layers' products want their rows padded to: done once a step, not before each."""
        products = [one for w in self.layers for one in (w.qkv, w.output, w.gate_up, w.down)]
        return math.lcm(*(product.row_multiple or 1 for product in products))


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

    def __init__(self, config: ModelConfig, weights: ModelWeights, attention: Attention, *, dtype: torch.dtype) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention
        self.kind = attention.kind
        self.block_tokens = attention.block_tokens
        self.clear = attention.clear
        self.dtype = dtype
        self._row_multiple = weights.row_multiple

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D). Only for a range that holds the first layer."""
        assert self.weights.embedding is not None
        embedding = self.weights.embedding
        if isinstance(embedding, Quantized):
            return embedding.rows(tokens.to(embedding.scale.device)).to(self.dtype)
        return functional.embedding(tokens.to(embedding.device), embedding).to(self.dtype)

    def forward(self, batch: Batch) -> Tensor:
        return self.run_layers(self.embed(batch.tokens), self.attention.plan(batch))

    def run_layers(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """(T, D) -> (T, D) through the layers of this range; keys and values are written on the way."""
        rows = hidden.shape[0]
        hidden = pad_rows(hidden, self._row_multiple)
        for index, layer in enumerate(self.weights.layers):
            hidden = self._attention(hidden, index, layer, step).add_(hidden)
            hidden = self._mlp(hidden, layer).add_(hidden)
        return hidden[:rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V) float32. Only for a range that holds the last layer."""
        assert self.weights.norm is not None and self.weights.head is not None
        return self.weights.head(self.weights.norm(hidden)).float()

    def _attention(self, hidden: Tensor, index: int, layer: LayerWeights, step: AttentionStep) -> Tensor:
        config = self.config
        qkv = layer.qkv(layer.attention_norm(hidden)).view(-1, config.heads + 2 * config.kv_heads, config.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, : config.heads], qkv[:, config.heads : -config.kv_heads]
            queries.copy_(layer.query_norm(queries))
            keys.copy_(layer.key_norm(keys))
        return layer.output(pad_rows(step.attend(index, qkv), self._row_multiple))

    def _mlp(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up))
