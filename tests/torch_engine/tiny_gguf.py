"""A tiny GGUF file with the same random weights as the tiny Hugging Face model."""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
from safetensors.numpy import load_file

from gpu_worker.gguf_convert import LAYER_NAMES, OUTER_NAMES, Array
from tests.torch_engine.tiny import CONFIG, SPECIAL, TEMPLATE, tiny_tokenizer

OUTER = {hugging: name for name, hugging in OUTER_NAMES.items()}
LAYER = {hugging: name for name, hugging in LAYER_NAMES.items()}


def write_gguf(path: Path, weights: Path, extra: Mapping[str, str] | None = None, *, quantised: bool = False) -> Path:
    """weights: model.safetensors of a tiny llama. extra: string fields to add."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    pieces = sorted(tiny_tokenizer().get_vocab(), key=lambda piece: tiny_tokenizer_ids()[piece])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in SPECIAL else 1 for piece in pieces])
    writer.add_token_merges([f"{a} {b}" for a, b in tiny_merges()])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, text in (extra or {}).items():
        writer.add_string(name, text)
    for hugging, tensor in load_file(weights).items():
        array = permute(tensor, hugging)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and array.ndim == 2 else None
        data = gguf.quants.quantize(array, kind) if kind is not None else array
        writer.add_tensor(to_gguf_name(hugging), data, raw_dtype=kind)
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
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = CONFIG["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    out, width = tensor.shape
    return numpy.ascontiguousarray(
        tensor.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)
    )
