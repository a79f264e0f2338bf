"""Quantised weights are kept as the file has them, and mean what the file means, to the bit."""

import json
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from bus.settings import Settings
from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_blocks import Array, keep_blocks
from gpu_worker.gguf_convert import unpermute
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.quantized import Quantized
from gpu_worker.torch_engine.stored import cat
from tests.torch_engine.tiny import CONFIG, request, run, tiny_engine, tiny_model
from tests.torch_engine.tiny_gguf import write_gguf

Kind = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
KEPT = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)


def random_blocks(kind: gguf.GGMLQuantizationType, out: int = 96, width: int = 128) -> Array:
    values = numpy.random.default_rng(5).normal(size=(out, width)).astype(numpy.float32)
    blocks: Array = gguf.quants.quantize(values, kind)
    return blocks


def quantized(blocks: Array, kind: gguf.GGMLQuantizationType) -> Quantized:
    kept = keep_blocks(blocks, kind)
    assert kept is not None
    parts = {name: torch.from_numpy(array) for name, array in kept.items()}
    bits = 4 if "q4" in parts else 8
    return Quantized(bits, parts[f"q{bits}"], parts["scale"], parts.get("min"))


@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_weight_is_the_files_weight_to_the_bit(kind: gguf.GGMLQuantizationType) -> None:
    blocks = random_blocks(kind)

    found = quantized(blocks, kind)

    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert found.shape == expected.shape
    assert torch.equal(found.dequantize(), expected)
    some = torch.tensor([5, 0, 95, 5])
    assert torch.equal(found.rows(some), expected[some])


def test_inputs_lie_in_order_two_a_byte() -> None:
    """What a kernel that reads them relies on."""
    blocks = random_blocks(Kind.Q4_1)
    found = quantized(blocks, Kind.Q4_1)
    assert found.minimum is not None

    low, high = found.values[7, 20] & 15, found.values[7, 20] >> 4  # inputs 40 and 41, of group 1

    scale, minimum = found.scale[7, 1].float(), found.minimum[7, 1].float()
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q4_1))
    assert [scale * low + minimum, scale * high + minimum] == weight[7, 40:42].tolist()


@pytest.mark.parametrize("kind", KEPT)
def test_turned_rows_are_put_back_in_every_part(kind: gguf.GGMLQuantizationType) -> None:
    blocks = random_blocks(kind)
    kept = keep_blocks(blocks, kind)
    assert kept is not None
    parts = {name: torch.from_numpy(unpermute(array, 6)) for name, array in kept.items()}
    bits = 4 if "q4" in parts else 8

    found = Quantized(bits, parts[f"q{bits}"], parts["scale"], parts.get("min")).dequantize()

    assert torch.equal(found, torch.from_numpy(unpermute(gguf.quants.dequantize(blocks, kind), 6)))


def test_what_would_lose_a_bit_is_not_kept() -> None:
    """Eight times the largest scales is beyond float16."""
    blocks = random_blocks(Kind.Q4_0)
    blocks[0, :2] = numpy.array([60_000], numpy.float16).view(numpy.uint8)

    assert keep_blocks(blocks, Kind.Q4_0) is None
    assert keep_blocks(random_blocks(Kind.Q5_0), Kind.Q5_0) is None


def test_fused_parts_stay_quantised_if_they_are_alike() -> None:
    four, eight = quantized(random_blocks(Kind.Q4_1), Kind.Q4_1), quantized(random_blocks(Kind.Q8_0), Kind.Q8_0)

    alike, mixed = cat([four, four], torch.float32, CPU), cat([four, eight], torch.float32, CPU)

    assert isinstance(alike, Quantized)
    assert isinstance(mixed, torch.Tensor)
    assert torch.equal(alike.dequantize(), torch.cat([four.dequantize(), four.dequantize()]))
    assert torch.equal(mixed, torch.cat([four.dequantize(), eight.dequantize()]))


def kept_model(tmp_path: Path, kind: gguf.GGMLQuantizationType = Kind.Q4_1) -> Path:
    weights = tiny_model(tmp_path / "hf", tie_word_embeddings=True) / "model.safetensors"
    source = write_gguf(tmp_path / "tiny.gguf", weights, config={"tie_word_embeddings": True}, kind=kind)
    return resolve_model(Settings(model_path=str(source), var_dir=str(tmp_path / "var")))


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kept_model_answers(kind: gguf.GGMLQuantizationType, dtype: str, tmp_path: Path) -> None:
    directory = kept_model(tmp_path, kind)

    assert len(run(tiny_engine(directory, dtype=dtype), [request("a", "hello")])["a"].tokens) == 24
    assert json.loads((directory / "config.json").read_text())["hidden_size"] == CONFIG["hidden_size"]


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("scale", None, "lacks tensor .*up_proj.weight.scale"),
        ("min", None, "lacks tensor .*up_proj.weight.min"),
        (
            "scale",
            torch.zeros(96, 3, dtype=torch.float16),
            r"up_proj.weight.scale has shape \(96, 3\), expected \(96, 2\)",
        ),
        ("scale", torch.zeros(96, 2), "up_proj.weight.scale is stored as float32"),
        ("q4", torch.zeros(96, 32, dtype=torch.int8), "up_proj.weight.q4 is stored as int8"),
        (
            "scale",
            torch.full((96, 2), torch.nan, dtype=torch.float16),
            "up_proj.weight holds values that are not finite",
        ),
        ("zero", torch.zeros(96, 2, dtype=torch.float16), "does not know, such as .*up_proj.weight.zero"),
    ],
)
def test_a_wrong_part_is_named(name: str, changed: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    path = kept_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    whole = f"model.layers.1.mlp.up_proj.weight.{name}"
    tensors.pop(whole, None)
    save_file(tensors | ({} if changed is None else {whole: changed}), path)

    with pytest.raises(EngineStartError, match=said):
        tiny_engine(path.parent)
