"""A GGUF file, once, into a Hugging Face directory: the one form that the engine loads.

Weights are dequantised. Quantised kinds go to float16, which holds their grids (float16 scales times small integers) to
2^-12; others keep float32. llama.cpp stores the query and key rows of its `llama` architecture in another order (pairs
that rotate together are neighbours); they are put back.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
from safetensors.numpy import save_file

from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_tokenizer import build_tokenizer

log = logging.getLogger(__name__)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHARD_BYTES = 2 << 30
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

Array = numpy.ndarray[Any, Any]


def convert_gguf(source: Path, target: Path, generation: Mapping[str, Any], progress: Callable[[float], None]) -> None:
    """Write `target` (an existing, empty directory). generation: sampling defaults, which GGUF does not carry.

    Raises EngineStartError on an architecture, tensor or tokenizer that we do not know.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError) as error:
        raise EngineStartError(f"{source}: cannot be read as GGUF: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = to_config(metadata, {tensor.name for tensor in reader.tensors})
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", {"eos_token_id": config["eos_token_id"], **generation})
    write_json(target / "tokenizer_config.json", to_tokenizer_config(metadata))
    build_tokenizer(metadata).save(str(target / "tokenizer.json"))
    write_shards(target, convert_tensors(reader.tensors, config, progress))


def to_config(metadata: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    kind = str(metadata.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise EngineStartError(f"GGUF architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if "rope_freqs.weight" in tensors or metadata.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise EngineStartError("GGUF files with RoPE scaling are not supported; use the model's Hugging Face directory")

    def value(name: str) -> Any:
        try:
            return metadata[f"{kind}.{name}"]
        except KeyError as error:
            raise EngineStartError(f"the GGUF file lacks {kind}.{name}") from error

    heads = value("attention.head_count")
    ends = [
        metadata[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in metadata
    ]
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{kind}.attention.key_length", value("embedding_length") // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get(f"{kind}.rope.freq_base", 10_000.0),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "eos_token_id": sorted(set(ends)),
    }


def to_tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    pieces = metadata["tokenizer.ggml.tokens"]
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    named = {
        name: pieces[metadata[f"tokenizer.ggml.{field}"]]
        for name, field in ids.items()
        if f"tokenizer.ggml.{field}" in metadata
    }
    template = metadata.get("tokenizer.chat_template")
    return named | ({"chat_template": template} if template else {})


def convert_tensors(
    tensors: list[gguf.ReaderTensor], config: Mapping[str, Any], progress: Callable[[float], None]
) -> Iterator[tuple[str, Array]]:
    permuted = config["architectures"] == ["LlamaForCausalLM"]
    for done, tensor in enumerate(tensors):
        name = to_name(tensor.name)
        array: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"]
            array = unpermute(array, heads)
        unquantised = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16)
        yield name, numpy.ascontiguousarray(array, dtype=numpy.float32 if unquantised else numpy.float16)
        progress((done + 1) / len(tensors))


def to_name(name: str) -> str:
    """GGUF's tensor name -> Hugging Face's. Raises EngineStartError."""
    parts = name.split(".")
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise EngineStartError(f"the GGUF file has a tensor that we do not know: {name}")


def unpermute(weight: Array, heads: int) -> Array:
    """(heads * d, width) with rotating pairs as neighbours -> with halves, as Hugging Face has them."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def write_shards(target: Path, tensors: Iterator[tuple[str, Array]]) -> None:
    """One model.safetensors, or several with an index when the model is large, so that memory stays bounded."""
    shards: list[dict[str, Array]] = [{}]
    where: dict[str, int] = {}
    size = total = 0
    for name, array in tensors:
        if size and size + array.nbytes > SHARD_BYTES:
            save_file(shards[-1], target / f"part-{len(shards)}.safetensors")
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = array
        where[name] = len(shards)
        size += array.nbytes
        total += array.nbytes
    if len(shards) == 1:
        save_file(shards[0], target / "model.safetensors")
        return
    save_file(shards[-1], target / f"part-{len(shards)}.safetensors")
    names = {name: f"part-{number}.safetensors" for name, number in where.items()}
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
