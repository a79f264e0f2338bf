"""The slow, obvious form of the model: one sequence, whole, no cache, straight from the published equations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import reference_attend
from gpu_worker.torch_engine.model_config import parse_config


def reference_logits(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """(length, V) in float64, from Hugging Face's config fields and tensor names."""
    config = parse_config(dict(raw))
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    positions = torch.arange(len(tokens))
    angles = positions[:, None] * torch.tensor(config.rope.frequencies, dtype=torch.float64)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    hidden = weights["model.embed_tokens.weight"][tokens]
    for index in range(config.layers):
        prefix = f"model.layers.{index}"
        x = norm(hidden, f"{prefix}.input_layernorm")
        query = linear(x, f"{prefix}.self_attn.q_proj").view(len(tokens), config.heads, config.head_dim)
        key = linear(x, f"{prefix}.self_attn.k_proj").view(len(tokens), config.kv_heads, config.head_dim)
        value = linear(x, f"{prefix}.self_attn.v_proj").view(len(tokens), config.kv_heads, config.head_dim)
        if config.qk_norm:
            query, key = norm(query, f"{prefix}.self_attn.q_norm"), norm(key, f"{prefix}.self_attn.k_norm")
        attended = reference_attend(rotate(query) * config.head_dim**-0.5, rotate(key), value, positions)
        hidden = hidden + linear(attended, f"{prefix}.self_attn.o_proj")
        x = norm(hidden, f"{prefix}.post_attention_layernorm")
        gate = functional.silu(linear(x, f"{prefix}.mlp.gate_proj"))
        hidden = hidden + linear(gate * linear(x, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj")
    head = "model.embed_tokens" if config.tied_head else "lm_head"
    return linear(norm(hidden, "model.norm"), head)
