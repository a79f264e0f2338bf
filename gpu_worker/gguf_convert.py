"""A GGUF file, once, into a Hugging Face directory: the one form that the engine loads.

A model may be split over several files, `<name>-00001-of-00003.gguf` and so on; the first one stands for all.
Matrices of 4-bit and 8-bit blocks are kept as they are (gguf_blocks.py). Others are dequantised: quantised kinds to
float16, which holds their grids (float16 scales times small integers) to 2^-12; the rest keeps float32. llama.cpp has
the query and key rows of its `llama` architecture in another order (pairs that rotate together are neighbours); they
are put back.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_blocks import Array, Kind, keep_blocks
from gpu_worker.gguf_config import ROPE_FACTORS, to_config, to_sampling, to_tokenizer_config
from gpu_worker.gguf_parts import parts_of
from gpu_worker.gguf_tokenizer import build_tokenizer
from gpu_worker.gguf_vocabulary import check_vocabulary

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

UNQUANTISED = (Kind.F32, Kind.BF16)
HALF_MAX = 65504.0  # float16 ends there


def convert_gguf(source: Path, target: Path, generation: Mapping[str, Any], progress: Callable[[float], None]) -> None:
    """Write `target` (an existing, empty directory). generation: sampling defaults that win over the file's own.

    Raises EngineStartError on an architecture, tensor or tokenizer that we do not know, and on a malformed file.
    Raises OSError if `target` cannot be written.
    """
    try:
        _convert(source, target, generation, progress)
    except (EngineStartError, OSError, MemoryError):  # the last two are about this machine
        raise
    except Exception as error:  # whatever libraries raise on what they are given: all of it comes from the file
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EngineStartError(f"{source} is malformed ({cause}); get it again, or convert the model again") from error


def _convert(source: Path, target: Path, generation: Mapping[str, Any], progress: Callable[[float], None]) -> None:
    readers = [read_gguf(path) for path in parts_of(source)]
    metadata = check_vocabulary({name: field.contents() for name, field in readers[0].fields.items()})
    if metadata.get("split.count", 1) not in (0, len(readers)):
        raise EngineStartError(f"{source} is one of {metadata['split.count']} files, and its name does not say so")
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise EngineStartError(f"{source} has a tensor twice")
    factors = next((tensor.data.astype(float).tolist() for tensor in tensors if tensor.name == ROPE_FACTORS), None)
    config = to_config(metadata, names, factors)
    write_json(target / "config.json", config)
    ends = {"eos_token_id": config["eos_token_id"]}
    write_json(target / "generation_config.json", ends | to_sampling(metadata) | dict(generation))
    write_json(target / "tokenizer_config.json", to_tokenizer_config(metadata))
    tokenizer = build_tokenizer(metadata).to_str(pretty=True)  # its own `save` raises the bare Exception on a full disk
    (target / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    weights = [tensor for tensor in tensors if tensor.name != ROPE_FACTORS]
    write_shards(target, convert_tensors(weights, config, progress))


class BoundedReader(gguf.GGUFReader):
    """The library takes nothing for what lies behind the end: a list of a damaged length then fills the memory."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Array:
        found: Array = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError("the file is cut off or damaged")
        return found


def read_gguf(path: Path) -> gguf.GGUFReader:
    try:
        reader = BoundedReader(path)
    except MemoryError:
        raise
    except Exception as error:  # it raises whatever numbers in a file that is none, or is cut off, lead it to
        raise EngineStartError(f"{path}: cannot be read as GGUF: {error}; get it again") from error
    if reader.byte_order == "S":
        how = f"`gguf-convert-endian {path} little` rewrites it"
        raise EngineStartError(f"{path} is a big-endian GGUF file, for other machines than this one: {how}")
    return reader


def convert_tensors(
    tensors: list[gguf.ReaderTensor], config: Mapping[str, Any], progress: Callable[[float], None]
) -> Iterator[tuple[str, Array]]:
    for done, tensor in enumerate(tensors):
        name = to_name(tensor.name)
        heads = rotated_heads(name, config)
        arrays = to_arrays(tensor)
        if heads and tensor.data.shape[0] % (2 * heads):
            raise EngineStartError(f"tensor {tensor.name} has {tensor.data.shape[0]} rows, which are not {heads} heads")
        for part, array in arrays.items():
            yield f"{name}.{part}".rstrip("."), unpermute(array, heads) if heads else array
        progress((done + 1) / len(tensors))


def rotated_heads(name: str, config: Mapping[str, Any]) -> int:
    """How many heads a tensor has whose rows lie in llama.cpp's order; 0 for all others."""
    if config["model_type"] != "llama":
        return 0
    if "q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if "k_proj." in name else 0


def to_arrays(tensor: gguf.ReaderTensor) -> dict[str, Array]:
    """By suffix; one without a suffix if it is dequantised."""
    kept = keep_blocks(tensor.data, tensor.tensor_type)
    if kept is not None:
        check_finite(tensor.name, [kept["scale"], kept.get("min", kept["scale"])])
        return kept
    array = to_values(tensor)
    check_finite(tensor.name, [array])
    whole = tensor.tensor_type in UNQUANTISED or numpy.abs(array).max(initial=0.0) > HALF_MAX
    return {"": numpy.ascontiguousarray(array, dtype=numpy.float32 if whole else numpy.float16)}


def check_finite(name: str, arrays: list[Array]) -> None:
    """A damaged block is one wrong scale away from values that no weight has."""
    if not all(numpy.isfinite(array).all() for array in arrays):
        raise EngineStartError(f"tensor {name} holds values that are not finite: the GGUF file is damaged")


def to_values(tensor: gguf.ReaderTensor) -> Array:
    try:
        array: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise EngineStartError(f"tensor {tensor.name} has block type {kind}, which is not supported") from error
    return array


def to_name(name: str) -> str:
    """GGUF's tensor name -> Hugging Face's. Raises EngineStartError."""
    parts = name.split(".")
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise EngineStartError(f"the GGUF file has a tensor that we do not know: {name}")


def unpermute(weight: Array, heads: int) -> Array:
    """(heads * d, ...) with rotating pairs as neighbours -> with halves, as Hugging Face has them."""
    out, *rest = weight.shape
    halves = weight.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2)
    return numpy.ascontiguousarray(halves.reshape(out, *rest))


def write_shards(target: Path, tensors: Iterator[tuple[str, Array]]) -> None:
    """One model.safetensors, or several with an index when the model is large, so that memory stays bounded."""
    shards: list[dict[str, Array]] = [{}]
    where: dict[str, int] = {}
    size = total = 0
    for name, array in tensors:
        if size and size + array.nbytes > SHARD_BYTES:
            write_shard(target / f"part-{len(shards)}.safetensors", shards[-1])
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = array
        where[name] = len(shards)
        size += array.nbytes
        total += array.nbytes
    if len(shards) == 1:
        write_shard(target / "model.safetensors", shards[0])
        return
    write_shard(target / f"part-{len(shards)}.safetensors", shards[-1])
    names = {name: f"part-{number}.safetensors" for name, number in where.items()}
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})


def write_shard(path: Path, tensors: dict[str, Array]) -> None:
    """Raises OSError, which the library wraps into an error of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
