"""The shape of a Llama-family decoder, parsed from config.json. Pure.

To add a family: its architecture name in `ARCHITECTURES`, what it does differently as a field here, a line in model.py.
"""

import dataclasses
import math
from typing import Any

from gpu_worker.engine import EngineStartError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMS norm of each query and key head before the rotation

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Raises EngineStartError on an architecture or a feature that we do not compute."""
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise EngineStartError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    try:
        return _parse(raw, architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineStartError(f"config.json: missing or bad field: {error}") from error


def _parse(raw: dict[str, Any], architecture: str) -> ModelConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise EngineStartError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only silu")
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    context = int(raw["max_position_embeddings"])
    window = raw.get("sliding_window") if raw.get("use_sliding_window", architecture.startswith("Mistral")) else None
    rope = raw.get("rope_parameters") or {}  # where transformers 5 keeps what rope_theta and rope_scaling were
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        layers=int(raw["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate=int(raw["intermediate_size"]),
        vocabulary=int(raw["vocab_size"]),
        context=min(context, int(window)) if window else context,  # inside the window, all attention is full attention
        norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=dict(raw.get("rope_scaling") or rope),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def rope_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each pair of dimensions: head_dim / 2 of them.

    Scaling: `linear` stretches all positions; `llama3` stretches the slow frequencies only (Llama 3.1's own rule).
    """
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-2 * n / config.head_dim) for n in range(half)]
    scaling = config.rope_scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return plain
    if kind == "linear":
        return [frequency / scaling["factor"] for frequency in plain]
    if kind == "llama3":
        return [_llama3(frequency, scaling) for frequency in plain]
    raise EngineStartError(f"config.json: rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def _llama3(frequency: float, scaling: dict[str, Any]) -> float:
    wavelength = 2 * math.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / float(scaling["factor"])
    smooth = (original / wavelength - low) / (high - low)
    return float((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
