"""A Llama-family decoder over a flat batch, or any contiguous range of its layers.

Nothing here knows of requests: tokens and positions in, logits out. Residuals, norms and products are each one line.
Shapes: T rows of the batch, D hidden, H heads, K key/value heads, d head_dim, V vocabulary.
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import attend
from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.kv_cache import KVCache
from gpu_worker.torch_engine.linear import Linear, pad_rows
from gpu_worker.torch_engine.model_config import ModelConfig, rope_frequencies
from gpu_worker.torch_engine.norm import RmsNorm


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
    embedding: Tensor | None  # (V, D), in whatever dtype holds it exactly
    norm: RmsNorm | None
    head: Linear | None  # D -> V

    @property
    def row_multiple(self) -> int:
        """What the layers' products want their rows padded to: done once a step, not before each."""
        products = [one for w in self.layers for one in (w.qkv, w.output, w.gate_up, w.down)]
        return math.lcm(*(product.row_multiple or 1 for product in products))


class Decoder:
    def __init__(
        self, config: ModelConfig, weights: ModelWeights, *, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.weights = weights
        self.cos, self.sin = rotary_tables(config, context, device, dtype)
        self.dtype = dtype
        self._row_multiple = weights.row_multiple
        self._head_scale = torch.ones(config.heads + config.kv_heads, 1, device=device, dtype=dtype)
        self._head_scale[: config.heads] = config.head_dim**-0.5  # the attention's, put on queries as they rotate

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D). Only for a range that holds the first layer."""
        assert self.weights.embedding is not None
        return functional.embedding(tokens, self.weights.embedding).to(self.dtype)

    def forward(self, hidden: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """(T, D) -> (T, D) through the layers of this range; keys and values are written on the way."""
        rows = hidden.shape[0]
        hidden = pad_rows(hidden, self._row_multiple)
        positions = functional.pad(batch.positions, (0, hidden.shape[0] - rows))
        cos = self.cos[positions].unsqueeze(1) * self._head_scale  # (T, H + K, d)
        sin = self.sin[positions].unsqueeze(1) * self._head_scale
        for index, layer in enumerate(self.weights.layers):
            hidden = self._attention(hidden, index, layer, cos, sin, batch, cache).add_(hidden)
            hidden = self._mlp(hidden, layer).add_(hidden)
        return hidden[:rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, D) -> (rows, V) float32. Only for a range that holds the last layer."""
        assert self.weights.norm is not None and self.weights.head is not None
        return self.weights.head(self.weights.norm(hidden)).float()

    def _attention(
        self, hidden: Tensor, index: int, layer: LayerWeights, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache
    ) -> Tensor:
        config, rows = self.config, batch.tokens.shape[0]
        qkv = layer.qkv(layer.attention_norm(hidden)).view(-1, config.heads + 2 * config.kv_heads, config.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = qkv[:, : config.heads], qkv[:, config.heads : -config.kv_heads]
            queries.copy_(layer.query_norm(queries))
            keys.copy_(layer.key_norm(keys))
        rotated = qkv[:, : -config.kv_heads]  # queries and keys side by side
        turned = rotated.roll(config.head_dim // 2, -1).mul_(sin)
        rotated.mul_(cos).add_(turned)
        cache.write(index, batch.slots, qkv[:rows, config.heads :])
        attended = attend(qkv, cache, index, batch.groups)
        return layer.output(pad_rows(attended, self._row_multiple))

    def _mlp(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up))


def rotary_tables(config: ModelConfig, context: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (context, d). The sine's first half is negative: x * cos + roll(x, d/2) * sin rotates x."""
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float64)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
    cos = torch.cat([angles.cos(), angles.cos()], -1)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)
    return cos.to(device, dtype), sin.to(device, dtype)
