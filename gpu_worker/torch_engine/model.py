"""A Llama-family decoder over a flat batch, or any contiguous range of its layers.

Nothing here knows of requests: tokens and positions in, logits out. Residuals, norms and products are each one line.
Shapes: T rows of the batch, D hidden, H heads, K key/value heads, d head_dim, V vocabulary.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import attend
from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.kv_cache import KVCache
from gpu_worker.torch_engine.linear import Linear
from gpu_worker.torch_engine.model_config import ModelConfig, rope_frequencies


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; query/key/value and gate/up are fused, so each is one product."""

    attention_norm: Tensor  # (D,)
    qkv: Linear  # D -> (H + 2K) d
    query_norm: Tensor | None  # (d,), Qwen3
    key_norm: Tensor | None
    output: Linear  # H d -> D
    mlp_norm: Tensor  # (D,)
    gate_up: Linear  # D -> 2 * intermediate
    down: Linear  # intermediate -> D


@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """`embedding` is there if the range holds the first layer; `norm` and `head` if it holds the last."""

    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None  # (V, D), in whatever dtype holds it exactly
    norm: Tensor | None  # (D,)
    head: Linear | None  # D -> V


class Decoder:
    def __init__(
        self, config: ModelConfig, weights: ModelWeights, *, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.weights = weights
        self.cos, self.sin = rotary_tables(config, context, device, dtype)
        self.dtype = dtype
        self.scale = config.head_dim**-0.5

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D). Only for a range that holds the first layer."""
        assert self.weights.embedding is not None
        return functional.embedding(tokens, self.weights.embedding).to(self.dtype)

    def forward(self, hidden: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """(T, D) -> (T, D) through the layers of this range; keys and values are written on the way."""
        cos, sin = self.cos[batch.positions].unsqueeze(1), self.sin[batch.positions].unsqueeze(1)  # (T, 1, d)
        for index, layer in enumerate(self.weights.layers):
            hidden = hidden + self._attention(hidden, index, layer, cos, sin, batch, cache)
            hidden = hidden + self._mlp(hidden, layer)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V) float32. Only for a range that holds the last layer."""
        assert self.weights.norm is not None and self.weights.head is not None
        return self.weights.head(self._norm(hidden, self.weights.norm)).float()

    def _attention(
        self, hidden: Tensor, index: int, layer: LayerWeights, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache
    ) -> Tensor:
        config = self.config
        qkv = layer.qkv(self._norm(hidden, layer.attention_norm)).view(
            -1, config.heads + 2 * config.kv_heads, config.head_dim
        )
        rotated, values = qkv[:, : -config.kv_heads], qkv[:, -config.kv_heads :]  # queries and keys side by side
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._norm(rotated[:, : config.heads], layer.query_norm)
            rotated = torch.cat([queries, self._norm(rotated[:, config.heads :], layer.key_norm)], dim=1)
        rotated = rotated * cos + rotated.roll(config.head_dim // 2, -1) * sin
        cache.write(index, batch.slots, rotated[:, config.heads :], values)
        return layer.output(attend(rotated[:, : config.heads] * self.scale, cache, index, batch.groups))

    def _mlp(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def rotary_tables(config: ModelConfig, context: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (context, d). The sine's first half is negative, so x * cos + roll(x, d/2) * sin rotates x."""
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float64)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
    cos = torch.cat([angles.cos(), angles.cos()], -1)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)
    return cos.to(device, dtype), sin.to(device, dtype)
