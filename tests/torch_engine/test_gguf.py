"""GGUF files: the same model as their Hugging Face form, or a refusal that names what is not supported."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

from bus.settings import Settings
from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_config import to_sampling
from gpu_worker.gguf_convert import convert_gguf, read_gguf, to_values
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.model_config import parse_config
from gpu_worker.torch_engine.sampling import SamplingDefaults
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.test_model import chunked_logits
from tests.torch_engine.tiny import CONFIG, request, run, tiny_engine, tiny_model
from tests.torch_engine.tiny_gguf import write_gguf

Kind = gguf.GGMLQuantizationType
TOKENS = [3 + (7 * n * n + n) % 250 for n in range(150)]
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def converted(source: Path, var: Path) -> Path:
    return resolve_model(Settings(model_path=str(source), var_dir=str(var)))


def in_both_forms(tmp_path: Path, config: dict[str, Any], **gguf_form: Any) -> tuple[Path, Path]:
    """A tiny model with these fields of config.json, and what its GGUF form was converted to."""
    original = tiny_model(tmp_path / "hf", **config)
    source = write_gguf(tmp_path / "tiny.gguf", original / "model.safetensors", config=config, **gguf_form)
    return original, converted(source, tmp_path / "var")


@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True}, QWEN2, QWEN3], ids=["llama", "tied", "qwen2", "qwen3"]
)
def test_each_family_has_the_same_logits_in_both_forms(config: dict[str, Any], tmp_path: Path) -> None:
    original, found = in_both_forms(tmp_path, config)

    assert torch.equal(chunked_logits(found, "torch", TOKENS, 77), chunked_logits(original, "torch", TOKENS, 77))


def test_scaled_positions_have_the_same_logits_in_both_forms(tmp_path: Path) -> None:
    """Over twice the length that YaRN was told of; 1.2 is a factor that llama.cpp multiplies on top."""
    own = 0.1 * numpy.log(4.0) + 1.0
    fields = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": 1.2,
    }
    config = {"rope_scaling": YARN | {"attention_factor": 1.2 * own}}
    original, found = in_both_forms(tmp_path, config, fields=fields)

    torch.testing.assert_close(
        chunked_logits(found, "torch", TOKENS, 77), chunked_logits(original, "torch", TOKENS, 77), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
        {"llama.rope.scale_linear": 2.5},
    ],
)
def test_stretched_positions_have_the_same_logits_in_both_forms(fields: dict[str, Any], tmp_path: Path) -> None:
    original, found = in_both_forms(tmp_path, {"rope_scaling": {"type": "linear", "factor": 2.5}}, fields=fields)

    assert torch.equal(chunked_logits(found, "torch", TOKENS, 77), chunked_logits(original, "torch", TOKENS, 77))


def test_llama_3_carries_its_scaling_as_a_tensor(tmp_path: Path) -> None:
    """One factor a pair of dimensions, as llama.cpp's converter computes it; good for every length."""
    config = {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}
    scaled, plain = (parse_config(CONFIG | {"vocab_size": 9} | more).rope.frequencies for more in (config, {}))
    factors = numpy.array([b / a for a, b in zip(scaled, plain, strict=True)], dtype=numpy.float32)
    original, found = in_both_forms(tmp_path, config, tensors={"rope_freqs.weight": factors})

    assert parse_config(json.loads((found / "config.json").read_text())).context == CONFIG["max_position_embeddings"]
    torch.testing.assert_close(
        chunked_logits(found, "torch", TOKENS, 77), chunked_logits(original, "torch", TOKENS, 77), rtol=1e-4, atol=1e-4
    )


def test_a_model_in_several_files_is_one_model(tmp_path: Path) -> None:
    original = tiny_model(tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", original / "model.safetensors", split=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2

    found = converted(parts[0], tmp_path / "var")

    assert torch.equal(chunked_logits(found, "torch", TOKENS, 77), chunked_logits(original, "torch", TOKENS, 77))
    with pytest.raises(EngineStartError, match="name the first part"):
        converted(parts[1], tmp_path / "var")
    parts[2].rename(tmp_path / "elsewhere")
    with pytest.raises(EngineStartError, match=f"{parts[2].name} is missing"):
        converted(parts[0], tmp_path / "var")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "RoPE scaling 'longrope'"),
        ({"llama.rope.scaling.type": "yarn"}, "no factor"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "differs by layer"),
        ({"general.architecture": "gemma"}, "architecture 'gemma'"),
        ({"tokenizer.ggml.pre": "strange"}, "splitting rule 'strange'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer kind 'bert'"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    weights = tiny_model(tmp_path / "hf") / "model.safetensors"
    source = write_gguf(tmp_path / "odd.gguf", weights, fields)

    with pytest.raises(EngineStartError, match=said):
        converted(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("blk.0.ffn_gate_exps.weight", numpy.zeros((2, 2), numpy.float32), "blk.0.ffn_gate_exps.weight"),
        ("output_norm.bias", numpy.zeros(2, numpy.float32), "output_norm.bias"),
        ("blk.0.attn_q.bias", numpy.array([1.0, numpy.nan], numpy.float32), "not finite"),
        ("blk.0.attn_q.bias", numpy.array([1, 2], numpy.int32), "block type I32"),
    ],
)
def test_a_tensor_that_we_cannot_use_is_refused_by_name(
    name: str, array: "numpy.ndarray[Any, Any]", said: str, tmp_path: Path
) -> None:
    weights = tiny_model(tmp_path / "hf") / "model.safetensors"
    source = write_gguf(tmp_path / "odd.gguf", weights, tensors={name: array})

    with pytest.raises(EngineStartError, match=said):
        converted(source, tmp_path)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    _, found = in_both_forms(tmp_path, {}, fields={"llama.attention.sliding_window": 96})

    assert parse_config(json.loads((found / "config.json").read_text())).context == 96


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "cut.gguf", tiny_model(tmp_path / "hf") / "model.safetensors")
    source.write_bytes(source.read_bytes()[:20_000])

    with pytest.raises(EngineStartError, match="cannot be read as GGUF"):
        converted(source, tmp_path)


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.MXFP4])
def test_a_quantised_model_answers_nearly_like_the_whole(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    original, found = in_both_forms(tmp_path, {}, kind=kind)

    there, here = (chunked_logits(path, "torch", TOKENS[:40], 77) for path in (original, found))
    likeness = torch.nn.functional.cosine_similarity(there.flatten(), here.flatten(), dim=0)
    assert likeness > (0.999 if kind in (Kind.BF16, Kind.Q8_0) else 0.7)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.name[0] in "QITM" and kind not in (Kind.I8, Kind.I16)])
def test_every_block_type_is_dequantised_or_refused_by_name(kind: gguf.GGMLQuantizationType) -> None:
    """Zero bytes are zero weights, or the type's least ones; what matters is that a type is known or named."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = numpy.zeros((3, size), numpy.uint8)
    shape, field = numpy.array([block, 3], numpy.uint32), gguf.ReaderField(0, "blk.0.attn_q.weight")
    tensor = gguf.ReaderTensor("blk.0.attn_q.weight", kind, shape, 3 * block, 3 * size, 0, data, field)
    if kind in (Kind.Q8_1, Kind.Q8_K, Kind.I32, Kind.I64, Kind.Q1_0):
        with pytest.raises(EngineStartError, match=kind.name):
            to_values(tensor)
    else:
        assert to_values(tensor).shape == (3, block)


SAMPLING = {
    "general.sampling.temp": 0.6000000238418579,  # as float32 has 0.6
    "general.sampling.top_k": 20,
    "general.sampling.top_p": 0.949999988079071,
    "general.sampling.min_p": 0.05,
    "general.sampling.penalty_repeat": 1.05,
}


def test_a_file_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    """Converters take it from the generation_config.json that they find; numbers are those that stood there."""
    _, found = in_both_forms(tmp_path, {}, fields=SAMPLING)

    defaults = TextModel(found).defaults
    assert defaults == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.05)


def test_a_sampling_default_that_cannot_be_heeded_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"general.sampling.top_p": 7.0, "general.sampling.mirostat": 2, "general.sampling.xtc_threshold": 0.0}

    assert to_sampling(SAMPLING | odd).keys() == {"temperature", "top_k", "min_p", "repetition_penalty"}
    assert [record.__dict__["field"] for record in caplog.records] == [
        "general.sampling.mirostat",
        "general.sampling.top_p",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer.ggml.merges": ["never seen"]}, "is malformed .*never"),
        ({"tokenizer.ggml.token_type": [3]}, "token_type"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0"),
        ({"llama.attention.head_count": 7}, "attn_q.weight has 96 rows, which are not 7 heads"),
        ({"llama.embedding_length": 64.0}, "llama.embedding_length = 64.0"),
        ({"llama.rope.freq_base": "many"}, "llama.rope.freq_base = many"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base = nan"),
        ({"llama.attention.key_length": [16, 16]}, "llama.attention.key_length differs by layer"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_field(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Anything else that is raised would start the worker again and again."""
    source = write_gguf(tmp_path / "odd.gguf", tiny_model(tmp_path / "hf") / "model.safetensors", fields)

    with pytest.raises(EngineStartError, match=said):
        converted(source, tmp_path)


@pytest.mark.parametrize(("file_bytes_max", "said"), [(2_000, "too large"), (20_000, "model.safetensors cannot be")])
def test_a_full_disk_is_not_taken_for_a_malformed_file(file_bytes_max: int, said: str, tmp_path: Path) -> None:
    """Else somebody gets gigabytes again, onto the same disk. It may be full at the tokenizer, or at the weights."""
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model(tmp_path / "hf") / "model.safetensors")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, before[1]))

    try:
        with pytest.raises(EngineStartError, match=f"cannot be prepared in .*{said}.*MILLRACE_VAR_DIR"):
            converted(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_memory_that_is_short_is_not_taken_for_a_malformed_file(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model(tmp_path / "hf") / "model.safetensors")

    def be_short(fraction: float) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        convert_gguf(source, tmp_path, {}, be_short)


def test_a_list_of_a_damaged_length_is_refused_at_once(tmp_path: Path) -> None:
    """The library would go on behind the end of the file, for as long as there is memory."""
    counts = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)  # version, tensors, fields
    field = struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 1 << 22)
    (tmp_path / "odd.gguf").write_bytes(counts + field)

    with pytest.raises(EngineStartError, match="cannot be read as GGUF: the file is cut off or damaged"):
        read_gguf(tmp_path / "odd.gguf")


@pytest.mark.parametrize("kind", [None, Kind.Q4_1, Kind.Q8_0])
def test_a_file_for_machines_of_the_other_byte_order_is_called_so(
    kind: gguf.GGMLQuantizationType | None, tmp_path: Path
) -> None:
    weights = tiny_model(tmp_path / "hf") / "model.safetensors"
    source = write_gguf(tmp_path / "big.gguf", weights, kind=kind, endianess=gguf.GGUFEndian.BIG)

    with pytest.raises(EngineStartError, match=r"big-endian .*gguf-convert-endian"):
        converted(source, tmp_path)


def test_a_converted_model_is_everybodys_to_read(tmp_path: Path) -> None:
    _, found = in_both_forms(tmp_path, {})

    assert all(file.stat().st_mode & 0o444 == 0o444 for file in found.iterdir())
    assert run(tiny_engine(found), [request("a", "hello")])["a"].end is not None
