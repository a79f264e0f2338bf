"""Where keys and values lie: one tensor a layer for each, cut into the blocks that kv_blocks.py hands out.

Shape (kv_heads, blocks + 1, BLOCK_TOKENS, head_dim): heads first, so that the blocks of one sequence gather into
(kv_heads, length, head_dim) without another copy. One tensor a layer, so that a write never copies the others.
Block 0 is the null block and stays zero.
"""

import numpy
import torch
from torch import Tensor

from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.model_config import ModelConfig


class KVCache:
    def __init__(
        self, config: ModelConfig, layers: range, blocks: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.kv_heads, blocks + 1, BLOCK_TOKENS, config.head_dim)
        self.keys = [_zeros(shape, device, dtype) for _ in layers]
        self.values = [_zeros(shape, device, dtype) for _ in layers]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values: (tokens, kv_heads, head_dim). slots: (tokens,) = block * BLOCK_TOKENS + place in the block."""
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cache.view(cache.shape[0], -1, cache.shape[3]).index_copy_(1, slots, new.transpose(0, 1))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """blocks: (count,). Returns keys and values, each (kv_heads, count, BLOCK_TOKENS, head_dim), contiguous."""
        return self.keys[layer].index_select(1, blocks), self.values[layer].index_select(1, blocks)

    def clear(self, blocks: list[int]) -> None:
        """Back to zero: a masked key has weight 0, but 0 times a value that is not finite would reach the next."""
        for cache in (*self.keys, *self.values):
            cache[:, blocks] = 0


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu" and dtype == torch.float32:
        # calloc: pages are zero and cost no memory before they are written, so a large pool is free until used
        return torch.from_numpy(numpy.zeros(shape, dtype=numpy.float32))
    return torch.zeros(shape, device=device, dtype=dtype)
