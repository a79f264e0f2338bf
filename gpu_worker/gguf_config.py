"""What a GGUF file says about its model, as the files of a Hugging Face directory say it. The metadata is checked.

Strict: a field of the architecture that we do not know is refused by name, since it may change the numbers.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from gguf import TokenType

from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_vocabulary import Fields, to_ends
from gpu_worker.torch_engine.sampling import parse_defaults

log = logging.getLogger(__name__)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
COUNTS = {  # whole numbers above zero
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count",),
}
NUMBERS = {
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
KNOWN = COUNTS | NUMBERS | {"rope.scaling.type", "rope.scaling.finetuned", "tensor_data_layout"}
ROPE_FACTORS = "rope_freqs.weight"  # a tensor: how much each pair of dimensions is slowed down
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # general.sampling.*: generation_config.json's name
ROLE_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # tokenizer_config.json's name: tokenizer.ggml.*


def to_config(metadata: Fields, tensors: set[str], rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """tensors: GGUF's names. rope_factors: the values of ROPE_FACTORS, if it is there. Raises EngineStartError."""
    kind = str(metadata.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise EngineStartError(f"GGUF architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    fields = {name.removeprefix(f"{kind}."): value for name, value in metadata.items() if name.startswith(f"{kind}.")}
    unknown = sorted(name for name in fields.keys() - KNOWN if fields[name] not in (0, False, ""))
    if unknown:
        raise EngineStartError(f"the GGUF file has {kind}.{unknown[0]} = {fields[unknown[0]]}, which is not supported")
    for name in sorted(fields.keys() & (COUNTS | NUMBERS)):
        check_number(f"{kind}.{name}", fields[name], count=name in COUNTS)

    def value(name: str) -> Any:
        if name not in fields:
            raise EngineStartError(f"the GGUF file lacks {kind}.{name}")
        return fields[name]

    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_dim = fields.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise EngineStartError(f"{kind}.{name} = {fields[name]} is not supported: a head has {head_dim} values")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv") if "attention.head_count_kv" in fields else heads,
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.get("rope.freq_base", 10_000.0),
        **to_rope_scaling(fields, rope_factors),
        **to_window(fields, kind),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "eos_token_id": to_ends(metadata),
    }


def check_number(name: str, value: Any, *, count: bool) -> None:
    if isinstance(value, list):
        raise EngineStartError(f"GGUF files whose {name} differs by layer are not supported")
    if count and (type(value) is not int or value < 1):
        raise EngineStartError(f"the GGUF file has {name} = {value}, which is no count; convert the model again")
    if type(value) not in (int, float) or not math.isfinite(value):
        raise EngineStartError(f"the GGUF file has {name} = {value}, which is no number; convert the model again")


def to_rope_scaling(fields: Fields, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """Nothing if positions are not scaled. Factors of each pair (Llama 3) are what config.json calls longrope, with
    the same factors for every length."""
    kind, factor = fields.get("rope.scaling.type", "none"), fields.get("rope.scaling.factor")
    if "rope.scale_linear" in fields:  # how older files said it
        kind, factor = "linear", fields["rope.scale_linear"]
    if rope_factors is not None:
        if kind != "none":
            raise EngineStartError(f"a GGUF file with {ROPE_FACTORS} and RoPE scaling {kind!r} is not supported")
        each = list(rope_factors)
        return {
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "short_factor": each,
                "long_factor": each,
                "original_max_position_embeddings": fields["context_length"],
            }
        }
    if kind == "none":
        return {}
    if not factor:
        raise EngineStartError(f"a GGUF file with RoPE scaling {kind!r} and no factor is not supported")
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn" and fields.get("rope.scaling.yarn_ext_factor", 1.0) == 1.0:
        return {"rope_scaling": to_yarn(fields, factor)}
    raise EngineStartError(f"a GGUF file with RoPE scaling {kind!r} is not supported; supported: linear, yarn")


def to_yarn(fields: Fields, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies its attention factors with YaRN's own."""
    own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    given = fields.get("rope.scaling.attn_factor", 1.0) * fields.get("rope.scaling.yarn_attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.get("rope.scaling.original_context_length")
        or fields["context_length"],
        "attention_factor": own * given,
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow", 1.0),
    }


def to_window(fields: Fields, kind: str) -> dict[str, Any]:
    """Of every layer; the architecture that heeds it for Llama's tensors is Mistral's."""
    window = fields.get("attention.sliding_window")
    if not window:
        return {}
    if kind == "llama":
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def to_sampling(metadata: Fields) -> dict[str, Any]:
    """How the file wants to be sampled where a request does not say (generation_config.json)."""
    sampling = {}
    for field in sorted(name for name in metadata if name.startswith("general.sampling.")):
        value, name = metadata[field], SAMPLING.get(field.removeprefix("general.sampling."))
        if isinstance(value, float):
            value = float(f"{value:.7g}")  # 0.6 was rounded to float32, and is 0.6 again
        try:
            if name is not None:
                parse_defaults({name: value})
                sampling[name] = value
            elif value:
                log.warning("a sampling default of the GGUF file is not supported", extra={"field": field})
        except EngineStartError as error:
            log.warning("a sampling default of the GGUF file is ignored", extra={"field": field, "why": str(error)})
    return sampling


def to_tokenizer_config(metadata: Fields) -> dict[str, Any]:
    """What begins and ends a text is what the file says, also if it calls it text: templates write it. What fills
    batches, or stands for unknown text, may be an ordinary piece such as `!`, which keeps its text and has no role."""
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    roles = {
        name: metadata[f"tokenizer.ggml.{field}"]
        for name, field in ROLE_IDS.items()
        if f"tokenizer.ggml.{field}" in metadata
    }
    named = {
        name: pieces[token]
        for name, token in roles.items()
        if name in ("bos_token", "eos_token") or kinds[token] in added
    }
    template = metadata.get("tokenizer.chat_template")
    return named | ({"chat_template": template} if template else {})
