"""A tiny GGUF file with the same random weights as the tiny Hugging Face model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
from safetensors.numpy import load_file

from gpu_worker.gguf_blocks import Array
from gpu_worker.gguf_convert import LAYER_NAMES, OUTER_NAMES
from tests.torch_engine.tiny import CONFIG, SPECIAL, TEMPLATE, tiny_tokenizer

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
OUTER = {hugging: name for name, hugging in OUTER_NAMES.items()}
LAYER = {hugging: name for name, hugging in LAYER_NAMES.items()}


def write_gguf(
    path: Path,
    weights: Path,
    fields: Mapping[str, Any] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
    split: int = 0,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """weights: model.safetensors of a tiny model, whose config is CONFIG with `config`'s changes.

    fields: more metadata; a name that is there already is replaced. tensors: more of them. kind: of the matrices.
    split: most tensors of one file; 0: all in one.
    """
    shape = CONFIG | dict(config or {})
    arch = ARCHITECTURES[shape["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch, endianess=endianess, split_max_tensors=split)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_theta"])
    pieces = sorted(tiny_tokenizer().get_vocab(), key=lambda piece: tiny_tokenizer_ids()[piece])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in SPECIAL else 1 for piece in pieces])
    writer.add_token_merges([f"{a} {b}" for a, b in tiny_merges()])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in (fields or {}).items():
        writer.kv_data[0].pop(name, None)
        adders: dict[type, Callable[[str, Any], None]] = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        adders.get(type(value), writer.add_array)(name, value)
    for hugging, tensor in load_file(weights).items():
        array = permute(tensor, hugging) if arch == "llama" else tensor
        quantised = kind if array.ndim == 2 and kind is not None else None
        writer.add_tensor(
            to_gguf_name(hugging),
            array if quantised is None else gguf.quants.quantize(array, quantised),
            raw_dtype=quantised,
        )
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_tokenizer_ids() -> dict[str, int]:
    return dict(tiny_tokenizer().get_vocab())


def tiny_merges() -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tiny_tokenizer().to_str())["model"]["merges"]]


def to_gguf_name(hugging: str) -> str:
    if hugging in OUTER:
        return OUTER[hugging]
    _, _, layer, *middle, last = hugging.split(".")
    return f"blk.{layer}.{LAYER['.'.join(middle)]}.{last}"


def permute(tensor: Array, name: str) -> Array:
    """As llama.cpp's converter stores queries and keys: rotating pairs become neighbours."""
    if "q_proj." not in name and "k_proj." not in name:
        return tensor
    heads = CONFIG["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    out, *rest = tensor.shape
    return numpy.ascontiguousarray(
        tensor.reshape(heads, 2, out // heads // 2, *rest).swapaxes(1, 2).reshape(out, *rest)
    )
