"""The tables of cosines and sines that turn queries and keys by their positions."""

import torch
from torch import Tensor

from gpu_worker.torch_engine.model_config import ModelConfig


def rotary_tables(config: ModelConfig, context: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (context, d). The sine's first half is negative: x * cos + roll(x, d/2) * sin rotates x."""
    rope = config.rope
    angles = torch.arange(context, dtype=torch.float64)[:, None] * torch.tensor(rope.frequencies, dtype=torch.float64)
    cos = torch.cat([angles.cos(), angles.cos()], -1) * rope.attention_factor
    sin = torch.cat([-angles.sin(), angles.sin()], -1) * rope.attention_factor
    return cos.to(device, dtype), sin.to(device, dtype)
