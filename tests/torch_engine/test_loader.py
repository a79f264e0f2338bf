"""Loading is strict: what is missing, wrong or left over is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder
from gpu_worker.torch_engine.loader import log_progress, resume_digest
from gpu_worker.torch_engine.model import Decoder
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.tiny import CONFIG, embedding_of, request, run, tiny_engine, tiny_model

LAYER = "model.layers.1.mlp.up_proj.weight"


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    rewrite(tiny_model(tmp_path), **{LAYER: None})

    with pytest.raises(EngineStartError, match=LAYER):
        tiny_engine(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    rewrite(tiny_model(tmp_path), **{LAYER: torch.zeros(3, 4)})

    with pytest.raises(EngineStartError, match=rf"{LAYER} has shape \(3, 4\), expected \(96, 64\)"):
        tiny_engine(tmp_path)


def test_a_tensor_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """It may be a part of the model that we would leave out silently."""
    rewrite(tiny_model(tmp_path), **{"model.layers.0.mlp.experts.weight": torch.zeros(2)})

    with pytest.raises(EngineStartError, match="experts"):
        tiny_engine(tmp_path)


def test_a_tied_head_may_be_stored_a_second_time(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path, tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, **{"lm_head.weight": embedding.clone()})

    tiny_engine(directory)


def test_what_is_tied_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    """safetensors' `save_model` keeps one of the names of a shared tensor: the first in the alphabet."""
    usual = tiny_model(tmp_path / "usual", tie_word_embeddings=True)
    as_head = tiny_model(tmp_path / "head", tie_word_embeddings=True)
    embedding = load_file(as_head / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(as_head, **{"model.embed_tokens.weight": None, "lm_head.weight": embedding})

    found = run(tiny_engine(as_head), [request("a", "hello")])["a"].tokens

    assert found == run(tiny_engine(usual), [request("a", "hello")])["a"].tokens


def test_what_is_not_tied_is_stored_twice(tmp_path: Path) -> None:
    rewrite(tiny_model(tmp_path), **{"model.embed_tokens.weight": None})

    with pytest.raises(EngineStartError, match=r"lacks tensor model\.embed_tokens\.weight"):
        tiny_engine(tmp_path)


def test_a_tied_head_that_is_stored_otherwise_is_refused(tmp_path: Path) -> None:
    """Either the config is wrong or the file; both guesses would answer, one of them badly."""
    directory = tiny_model(tmp_path, tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, **{"lm_head.weight": embedding * 2})

    with pytest.raises(EngineStartError, match=r"lm_head\.weight differs"):
        tiny_engine(directory)


def test_tables_that_older_exports_carry_are_left_aside(tmp_path: Path, model_dir: Path) -> None:
    table = torch.ones(8)
    names = ["model.rotary_emb.inv_freq", *(f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(3))]
    rewrite(tiny_model(tmp_path), **{name: table.clone() for name in names})

    found = run(tiny_engine(tmp_path), [request("a", "hello")])["a"].tokens

    assert found == run(tiny_engine(model_dir), [request("a", "hello")])["a"].tokens


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_is_no_weight_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    """Quantised checkpoints keep their scales elsewhere: numbers without them would be taken for weights."""
    rewrite(tiny_model(tmp_path), **{LAYER: torch.ones(96, 64).to(dtype)})

    with pytest.raises(EngineStartError, match=f"{LAYER} is stored as {str(dtype).removeprefix('torch.')}"):
        tiny_engine(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_float_is_a_weight(tmp_path: Path, model_dir: Path, dtype: torch.dtype) -> None:
    whole = load_file(tiny_model(tmp_path) / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in whole.items()}
    save_file({name: tensor.to(dtype) for name, tensor in rounded.items()}, tmp_path / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in rounded.items()}, tmp_path / "other.safetensors")

    found = run(tiny_engine(tmp_path), [request("a", "hello")])["a"].tokens

    (tmp_path / "other.safetensors").replace(tmp_path / "model.safetensors")
    assert found == run(tiny_engine(tmp_path), [request("a", "hello")])["a"].tokens


KERNELS = pytest.mark.parametrize("kernels", ["compiled", "torch"])


@KERNELS
@pytest.mark.parametrize(
    ("factor", "stored", "kept"),
    [
        (1.0, torch.bfloat16, torch.bfloat16),
        (2.0**-40, torch.float32, torch.bfloat16),  # below float16
        (1.0, torch.float16, torch.float16),
        (1.0, torch.float32, torch.float16),
        (1 + 2.0**-20, torch.float32, torch.float32),
    ],
)
def test_an_embedding_takes_two_bytes_a_number_where_that_is_exact(
    tmp_path: Path, kernels: str, factor: float, stored: torch.dtype, kept: torch.dtype
) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    name, tokens = "model.embed_tokens.weight", torch.tensor([3, 0, 266, 3])
    rows = (load_file(path)[name].bfloat16().half().float() * factor).to(stored)
    rewrite(tmp_path, **{name: rows})

    engine = tiny_engine(tmp_path, kernels=kernels)

    assert embedding_of(engine).dtype == kept
    model = engine.model
    assert isinstance(model, CompiledDecoder | Decoder)
    assert torch.equal(model.embed(tokens), rows[tokens].float())


@KERNELS
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_that_is_kept_lies_in_the_file(tmp_path: Path, kernels: str, kind: str, tied: bool) -> None:
    """A view would keep all of it mapped, and change with it."""
    path = tiny_model(tmp_path, tie_word_embeddings=tied) / "model.safetensors"
    save_file({name: tensor.to(getattr(torch, kind)) for name, tensor in load_file(path).items()}, path)

    engine = tiny_engine(tmp_path, kernels=kernels)

    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()
    path.write_bytes(bytes(path.stat().st_size))
    assert run(engine, [request("a", "hello")])["a"].tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [LAYER, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, value: float, name: str) -> None:
    tensor = load_file(tiny_model(tmp_path) / "model.safetensors")[name].clone()
    tensor.view(-1)[-1] = value
    rewrite(tmp_path, **{name: tensor})

    with pytest.raises(EngineStartError, match=f"{name} holds values that are not finite"):
        tiny_engine(tmp_path)


def sharded(directory: Path, **changes: list[str]) -> dict[str, torch.Tensor]:
    """Weights cut into two files with an index. changes: files whose tensors are others."""
    tensors = load_file(tiny_model(directory) / "model.safetensors")
    names = sorted(tensors)
    parts = {"one": names[::2], "two": names[1::2]} | changes
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, directory / f"{file}.safetensors")
    where = {name: f"{file}.safetensors" for file, held in parts.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "model.safetensors").unlink()
    return tensors


def test_several_shards_are_one_model(tmp_path: Path, model_dir: Path) -> None:
    sharded(tmp_path)

    found = run(tiny_engine(tmp_path), [request("a", "hello")])["a"].tokens

    assert found == run(tiny_engine(model_dir), [request("a", "hello")])["a"].tokens


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    names = sorted(sharded(tmp_path / "whole"))
    sharded(tmp_path / "twice", two=names[1:])

    with pytest.raises(EngineStartError, match=f"tensor {names[2]} is in two files"):
        tiny_engine(tmp_path / "twice")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()

    with pytest.raises(EngineStartError, match=r"two\.safetensors"):
        tiny_engine(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tiny_model(tmp_path) / "model.safetensors").rename(tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)

    with pytest.raises(EngineStartError, match=r"model\.safetensors\.index\.json"):
        tiny_engine(tmp_path)


def test_the_index_of_an_earlier_save_may_lie_beside_a_whole_file(tmp_path: Path, model_dir: Path) -> None:
    """`save_pretrained` into the same directory removes the old shards, not their index."""
    index = {"weight_map": {LAYER: "model-00001-of-00002.safetensors"}}
    (tiny_model(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))

    found = run(tiny_engine(tmp_path), [request("a", "hello")])["a"].tokens

    assert found == run(tiny_engine(model_dir), [request("a", "hello")])["a"].tokens


def test_other_forms_of_the_weights_may_lie_beside(tmp_path: Path, model_dir: Path) -> None:
    """Mistral publishes its own form in the same directory."""
    directory = tiny_model(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, directory / "consolidated.safetensors")

    found = run(tiny_engine(directory), [request("a", "hello")])["a"].tokens

    assert found == run(tiny_engine(model_dir), [request("a", "hello")])["a"].tokens


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(EngineStartError, match=r"model\.safetensors"):
        tiny_engine(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (tiny_model(tmp_path) / missing).unlink()

    with pytest.raises(EngineStartError, match=r"config\.json|tokenizer\.json|safetensors"):
        tiny_engine(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"hidden_size": None}, "bad field"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    directory = tiny_model(tmp_path)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 267} | change))

    with pytest.raises(EngineStartError, match=said):
        tiny_engine(directory)


def test_the_digest_tells_other_weights_and_other_tokenizers_apart(tmp_path: Path, model_dir: Path) -> None:
    """Also where only a file beside tokenizer.json makes a token visible or silent."""

    def digest(directory: Path) -> str:
        return resume_digest(directory, TextModel(directory).digest())

    same, other_weights = tiny_model(tmp_path / "same"), tiny_model(tmp_path / "weights", seed=1)
    changed, silent = tiny_model(tmp_path / "tokenizer"), tiny_model(tmp_path / "silent")
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((silent / "tokenizer_config.json").read_text())
    (silent / "tokenizer_config.json").write_text(json.dumps(config | {"image_token": "the"}))

    assert digest(same) == digest(model_dir)
    assert len({digest(same), digest(other_weights), digest(changed), digest(silent)}) == 4


def test_sampling_defaults_come_from_the_model(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    (directory / "generation_config.json").write_text('{"temperature": 0.2, "top_p": 0.9, "eos_token_id": [1, 2]}')

    text = tiny_engine(directory).text

    assert (text.defaults.temperature, text.defaults.top_p, text.defaults.top_k) == (0.2, 0.9, 0)
    assert text.eos == {1, 2}


def test_bfloat16_answers_too(model_dir: Path) -> None:
    outcome = run(tiny_engine(model_dir, dtype="bfloat16"), [request("a", "hello")])["a"]

    assert len(outcome.tokens) == 24


def test_progress_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 0.5, 1.5, 1.5, 1.6])
    progress = log_progress("tiny", clock=lambda: next(times))

    with caplog.at_level("INFO"):
        for fraction in (0.1, 0.5, 0.6):
            progress(fraction)

    assert [record.__dict__["percent"] for record in caplog.records] == [50]


@pytest.mark.parametrize("change", [{"capacity": 0}, {"prefill_chunk": 0}, {"kv_tokens": 3}])
def test_a_config_that_cannot_work_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        TorchEngineConfig(model_dir=tmp_path, **change)  # type: ignore[arg-type] # all three are integers
