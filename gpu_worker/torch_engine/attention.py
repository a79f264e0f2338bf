"""The seam between the model and a device: one backend owns keys and values and all that attention does with them.

The model gives a backend the fused projection of a layer and gets the attended rows back, in one call, which may be one
kernel: rotate queries and keys (RoPE), store keys and values in their blocks, attend. How blocks lie in memory, how
large they are, and what is prepared once a step is the backend's own business; all that they share is the `Batch`.

    | backend         | where          |  blocks of | what it is for                                             |
    |-----------------|----------------|-----------:|------------------------------------------------------------|
    | `tiles.py`      | any torch      |  32 tokens | same bits for a row in any batch: the measure of the others |
    | `cuda/paged.py` | GPU, bfloat16  | 256 tokens | FlashAttention over the blocks in place                     |
"""

from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.torch_engine.batch import Batch


class AttentionStep(Protocol):
    """What one step's attention needs, prepared once for all layers."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotate, store and attend: every row over all keys of its own sequence up to its own position.

        layer: counted from the first of the backend's own layers.
        qkv: (at least the batch's rows, heads + 2 kv_heads, head_dim), contiguous, query heads first, then keys, then
        values, neither rotated nor scaled; it may be overwritten. Rows behind the batch's are padding.
        Returns (the batch's rows, heads * head_dim).
        """


class Attention(Protocol):
    """Keys and values of some layers, and attention over them."""

    kind: str  # for the log
    block_tokens: int

    def plan(self, batch: Batch) -> AttentionStep: ...

    def clear(self, blocks: list[int]) -> None:
        """Back to zero: a masked key has weight 0, but 0 times a value that is not finite would reach the next."""


def reference_attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Plain causal attention of one sequence: what tests and probes hold the others to.

    query: (tokens, heads, head_dim), scaled, at `positions`; keys, values: (length, kv_heads, head_dim).
    """
    repeat = query.shape[1] // keys.shape[1]
    scores = torch.einsum("thd,shd->hts", query, keys.repeat_interleave(repeat, 1))
    hidden = torch.arange(keys.shape[0], device=keys.device)[None, :] > positions[:, None]
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return torch.einsum("hts,shd->thd", weights, values.repeat_interleave(repeat, 1)).flatten(1)
