"""The short operations between the products of a layer, each one call, so that a device may do it in one kernel.

`PLAIN` is torch alone, on any device. `cuda/fused.py` has the same as kernels; tests hold them to these.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.norm import RmsNorm


@dataclasses.dataclass(frozen=True)
class Ops:
    kind: str  # for the log
    rotate_and_store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    gated_silu: Callable[[Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, RmsNorm], tuple[Tensor, Tensor]]


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Rotate the query and key heads of qkv in place; put keys and values into their blocks.

    qkv: (rows, heads + 2 kv_heads, head_dim). cos, sin: (rows, head_dim), see `rotary_tables`. slots: (rows,) int64.
    keys, values: (blocks, tokens of a block, kv_heads, head_dim).
    """
    kv_heads, head_dim = keys.shape[2:]
    rotated = qkv[:, :-kv_heads]  # queries and keys side by side
    turned = rotated.roll(head_dim // 2, -1).mul_(sin.unsqueeze(1))
    rotated.mul_(cos.unsqueeze(1)).add_(turned)
    keys.view(-1, kv_heads, head_dim).index_copy_(0, slots, qkv[:, -2 * kv_heads : -kv_heads])
    values.view(-1, kv_heads, head_dim).index_copy_(0, slots, qkv[:, -kv_heads:])


def gated_silu(gate_up: Tensor) -> Tensor:
    """(rows, 2 n), gates first -> (rows, n): silu(gate) * up."""
    gate, up = torch.chunk(gate_up, 2, dim=-1)
    return functional.silu(gate).mul_(up)


def add_norm(delta: Tensor, hidden: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    """(rows, n) each. Returns delta + hidden, in place of delta, and its norm."""
    added = delta.add_(hidden)
    return added, norm(added)


PLAIN = Ops("plain", rotate_and_store, gated_silu, add_norm)
