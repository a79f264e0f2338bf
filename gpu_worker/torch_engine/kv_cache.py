"""Where keys and values lie for `tiles.py`: one tensor a layer, cut into the blocks that kv_blocks.py hands out.

Shape (2 kv_heads, blocks + 1, BLOCK_TOKENS, head_dim), the key heads first, then the value heads: as the projection
gives them, so both are one write and one gather. Heads first, so that the blocks of one sequence gather into
(heads, length, head_dim) without another copy. One tensor a layer, so that a write never copies the others.
Block 0 is the null block and stays zero.
"""

import math

import numpy
import torch
from torch import Tensor

from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.model_config import ModelConfig


class KVCache:
    def __init__(
        self, config: ModelConfig, layers: range, blocks: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2 * config.kv_heads, blocks + 1, BLOCK_TOKENS, config.head_dim)
        self.layers = [_zeros(shape, device, dtype) for _ in layers]
        self._gathered = torch.empty(0, device=device, dtype=dtype)

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """keys_values: (tokens, 2 kv_heads, head_dim). slots: (tokens,) = block * BLOCK_TOKENS + place in the block."""
        cache = self.layers[layer]
        cache.view(cache.shape[0], -1, cache.shape[3]).index_copy_(1, slots, keys_values.transpose(0, 1))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """blocks: (count,). Returns keys and values, each (kv_heads, count, BLOCK_TOKENS, head_dim), contiguous.

        They lie in one buffer, which the next gather overwrites: megabytes that stay in the CPU's cache between layers.
        """
        cache = self.layers[layer]
        shape = (cache.shape[0], blocks.shape[0], *cache.shape[2:])
        if self._gathered.numel() < math.prod(shape):
            self._gathered = torch.empty(math.prod(shape), dtype=cache.dtype, device=cache.device)
        gathered = self._gathered[: math.prod(shape)].view(shape)
        torch.index_select(cache, 1, blocks, out=gathered)
        return gathered[: shape[0] // 2], gathered[shape[0] // 2 :]

    def clear(self, blocks: list[int]) -> None:
        """Back to zero: a masked key has weight 0, but 0 times a value that is not finite would reach the next."""
        for cache in self.layers:
            cache[:, blocks] = 0


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # calloc: pages are zero and cost no memory before they are written, so a large pool is free until used
    raw = numpy.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=numpy.uint8)  # NumPy knows no bfloat16
    return torch.from_numpy(raw).view(dtype)
