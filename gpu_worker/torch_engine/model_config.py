"""The shape of a Llama-family decoder, parsed from config.json. Pure.

To add a family: its architecture name in `FAMILIES`, what it does differently as a field there and here, a line in
model.py. What we do not compute is refused by name, and what we do not know is said: a field that changes numbers and
is silently left out gives a model that answers, and answers badly.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.rope_scaling import Rope, parse_rope

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture does whatever its config says, and which fields of the config it heeds."""

    qkv_bias: bool = False
    biases: tuple[str, ...] = ()  # fields that turn biases on
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    head_dim: int | None = None  # if the config has none; else hidden / heads
    window: Literal["never", "always", "if asked"] = "never"  # whether it heeds sliding_window; asked: a field says so


FAMILIES = {
    "LlamaForCausalLM": Family(biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="if asked"),
    "Qwen3ForCausalLM": Family(biases=("attention_bias",), qk_norm=True, head_dim=128, window="if asked"),
}
WINDOW = 4096  # sliding_window if the config has none
WINDOW_LAYERS = 28  # max_window_layers likewise

COUNTS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("max_position_embeddings",),
)
USED = {
    *("architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "hidden_act", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("layer_types", "bos_token_id", "eos_token_id", "pad_token_id", "model_type"),
}
# Published with these families, and without effect on what the model computes.
INERT = {
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp", "auto_map"),
    *("attention_dropout", "hidden_dropout", "_name_or_path", "is_llama_config"),
    *(
        "task_specific_params",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
        "output_attentions",
        "output_hidden_states",
    ),
    *("return_dict", "chunk_size_feed_forward", "id2label", "label2id", "attn_implementation", "_attn_implementation"),
    *(
        "num_logits_to_keep",
        "problem_type",
        "tokenizer_class",
        "license",
        "max_length",
        "temperature",
        "top_p",
        "top_k",
    ),
}
# Parts of the names by which published configs turn on what none of these families computes.
CHANGES_NUMBERS = (
    *("multiplier", "scal", "softcap", "soft_cap", "clip", "norm", "expert", "moe", "sink", "alibi", "rope", "rotary"),
    *("bias", "residual", "quantization", "window", "attention_chunk", "position", "shared", "cross_layer", "lora"),
)


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
    rope: Rope
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

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
    if architecture not in FAMILIES:
        raise EngineStartError(f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        return _parse(raw, FAMILIES[architecture])
    except KeyError as error:
        raise EngineStartError(f"config.json: missing field: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise EngineStartError(f"config.json: bad field: {error}") from error


def _parse(raw: dict[str, Any], family: Family) -> ModelConfig:
    _check_fields(raw)
    counts = {name: _count(name, raw[name]) for name in COUNTS}
    heads, hidden = counts["num_attention_heads"], counts["hidden_size"]
    kv_heads = _count("num_key_value_heads", raw.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    head_dim = _count("head_dim", raw.get("head_dim") or family.head_dim or hidden // heads)
    rope = parse_rope(raw, head_dim)
    attention_bias = "attention_bias" in family.biases and bool(raw.get("attention_bias"))
    return ModelConfig(
        layers=counts["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=counts["intermediate_size"],
        vocabulary=counts["vocab_size"],
        context=_context(raw, family, rope.context),
        norm_eps=float(raw["rms_norm_eps"]),
        rope=rope,
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family.qkv_bias,
        output_bias=attention_bias,
        mlp_bias="mlp_bias" in family.biases and bool(raw.get("mlp_bias")),
        qk_norm=family.qk_norm,
    )


def _count(name: str, value: Any) -> int:
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):  # null, a text, infinity
        whole = 0
    if whole < 1 or (isinstance(value, float) and whole != value):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return whole


def _check_fields(raw: Mapping[str, Any]) -> None:
    """Refuses by name what would change numbers; other unknown fields are said once."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise EngineStartError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only silu")
    unknown = sorted(name for name, value in raw.items() if name not in USED | INERT and not _is_off(value))
    for name in unknown:
        if any(part in name for part in CHANGES_NUMBERS):
            raise EngineStartError(f"config.json: {name} = {str(raw[name])[:80]} is not supported")
    if unknown:
        log.warning("config.json has fields that we do not know", extra={"fields": ", ".join(unknown)})


def _is_off(value: Any) -> bool:
    """Empty, false, zero, and the factor that changes nothing."""
    return value in (None, "", [], {}) or value is False or (value in (0, 1) and not isinstance(value, bool))


def _context(raw: Mapping[str, Any], family: Family, most: int) -> int:
    """Tokens of a sequence at most. Inside its sliding window all attention is full attention; beyond it we would be
    wrong, so there the context ends."""
    window = _window(raw, family)
    if most < int(raw["max_position_embeddings"]):
        log.warning("context ends at the length that RoPE was trained with", extra={"context": most})
    if window is None or window >= most:
        return most
    log.warning("context ends at the sliding window", extra={"context": window, "model_context": most})
    return window


def _window(raw: Mapping[str, Any], family: Family) -> int | None:
    """Of the layers that have one; None if all see everything."""
    kinds = set(raw.get("layer_types") or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange:
        raise EngineStartError(f"config.json: layer type {strange[0]!r} is not supported")
    sliding = "sliding_attention" in kinds
    if family.window == "never":
        if sliding:
            raise EngineStartError("config.json: this architecture has no layers of type 'sliding_attention'")
        return None
    window = raw.get("sliding_window", WINDOW)
    if family.window == "if asked" and not sliding:
        some_slide = int(raw.get("max_window_layers", WINDOW_LAYERS)) < int(raw["num_hidden_layers"])
        if kinds or not raw.get("use_sliding_window") or not some_slide:
            return None
    return None if window is None else _count("sliding_window", window)
