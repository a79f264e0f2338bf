"""The model's numbers, held to the slow and obvious form of the same equations."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.attention import reference_attend
from gpu_worker.torch_engine.batch import Batch, build_batch
from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder, supports
from gpu_worker.torch_engine.kernels.packing import PackedFactory
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.linear import LinearFactory, half_exponent, probe_row_multiple
from gpu_worker.torch_engine.loader import load_weights
from gpu_worker.torch_engine.model import Decoder
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence
from gpu_worker.torch_engine.tiles import (
    KV_TILE,
    MULTIPLES,
    TileAttention,
    add_tiles,
    attend_group,
    round_tiles,
)
from gpu_worker.torch_engine.tiles import probe_row_multiple as probe_attention
from tests.torch_engine.reference import reference_logits
from tests.torch_engine.tiny import CONFIG, tiny_model

CPU = torch.device("cpu")
FACTORY = LinearFactory(device=CPU, dtype=torch.float32)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, untied": {},
    "llama, tied": {"tie_word_embeddings": True},
    "one query head per kv head": {"num_key_value_heads": 6},
    "llama 3 rope scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2, biased projections": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3, query and key norms": {"architectures": ["Qwen3ForCausalLM"]},
}


def tile_attention(config: ModelConfig, layers: range) -> TileAttention:
    return TileAttention(config, layers, 64, context=1024, exact=True, device=CPU, dtype=torch.float32)


KERNELS = pytest.mark.parametrize("kernels", ["torch", "compiled"])


def loaded(directory: Path, kernels: str, layers: range | None = None) -> Decoder | CompiledDecoder:
    config = parse_config(json.loads((directory / "config.json").read_text()))
    layers = layers or range(config.layers)
    if kernels == "compiled":
        assert supports(config)
        packed = load_weights(directory, config, layers, PackedFactory(), lambda fraction: None)
        return CompiledDecoder(config, packed, blocks=64, context=1024, threads=1)
    weights = load_weights(directory, config, layers, FACTORY, lambda fraction: None)
    return Decoder(config, weights, tile_attention(config, layers), dtype=torch.float32)


def run_layers(decoder: Decoder | CompiledDecoder, hidden: Tensor, batch: Batch) -> Tensor:
    if isinstance(decoder, CompiledDecoder):
        return decoder.run_layers(hidden, decoder.plan(batch)).clone()
    return decoder.run_layers(hidden, decoder.attention.plan(batch))


def sequence(tokens: list[int]) -> Sequence:
    return Sequence("s", tokens, len(tokens), 0, 1024, SamplingChoice(0.0, 1.0, 0, 0))


@torch.inference_mode()
def chunked_logits(directory: Path, kernels: str, tokens: list[int], chunk: int) -> Tensor:
    """Logits of every position, prefilled in chunks of this size (1: all as decode rows)."""
    decoder = loaded(directory, kernels)
    scheduler = Scheduler(BlockPool(64, BLOCK_TOKENS), capacity=1, chunk_max=chunk)
    scheduler.add(sequence(tokens))
    rows: list[Tensor] = []
    while sum(part.shape[0] for part in rows) < len(tokens):
        plan = scheduler.plan()
        batch = build_batch(plan, block_tokens=BLOCK_TOKENS)
        rows.append(decoder.logits(decoder.forward(batch)).clone())
        scheduler.launched(plan)
        scheduler.collected(plan.work[0], plan.work[0].count)
    return torch.cat(rows)


@KERNELS
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_reference(family: str, kernels: str, tmp_path: Path) -> None:
    directory = tiny_model(tmp_path, **FAMILIES[family])
    tokens = [3 + (7 * n * n + n) % 250 for n in range(200)]

    found = chunked_logits(directory, kernels, tokens, chunk=77)

    expected = reference_logits(
        json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors"), tokens
    )
    assert (found.double() - expected).abs().max() < 1e-3 * expected.abs().max()


@KERNELS
def test_logits_are_the_same_bits_whatever_the_chunks(kernels: str, model_dir: Path) -> None:
    tokens = [3 + (5 * n * n + n) % 250 for n in range(300)]

    whole = chunked_logits(model_dir, kernels, tokens, chunk=1000)

    for chunk in (1, 33, 128, 250):
        assert torch.equal(chunked_logits(model_dir, kernels, tokens, chunk), whole), f"chunks of {chunk}"


@KERNELS
@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_ranges_of_layers_give_the_same_bits_as_the_whole(cuts: tuple[int, ...], kernels: str, model_dir: Path) -> None:
    """What layer-sharded nodes rest on: hidden states in, hidden states out."""
    tokens = [3 + (5 * n) % 250 for n in range(50)]
    whole = chunked_logits(model_dir, kernels, tokens, chunk=1000)
    parts = [loaded(model_dir, kernels, range(*cut)) for cut in pairwise(cuts)]
    scheduler = Scheduler(BlockPool(64, BLOCK_TOKENS), capacity=1, chunk_max=1000)
    scheduler.add(sequence(tokens))

    with torch.inference_mode():
        batch = build_batch(scheduler.plan(), block_tokens=BLOCK_TOKENS)
        hidden = parts[0].embed(batch.tokens)
        for decoder in parts:
            hidden = run_layers(decoder, hidden, batch)
        found = parts[-1].logits(hidden)

    assert torch.equal(found, whole)


@pytest.mark.parametrize("lengths", [[1, 40, 128, 129], [300, 5, 700]])
def test_decode_rows_of_different_lengths_attend_like_the_reference(lengths: list[int]) -> None:
    config = parse_config(CONFIG | {"vocab_size": 10, "num_hidden_layers": 1})
    attention = tile_attention(config, range(1))
    generator = torch.Generator().manual_seed(0)
    pool = BlockPool(64, BLOCK_TOKENS)
    works, contents = [], []
    for length in lengths:
        one = sequence([1] * length)
        one.blocks = pool.take(pool.blocks_for(length))
        keys, values = torch.randn(2, length, config.kv_heads, config.head_dim, generator=generator)
        slots = torch.tensor([one.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(length)])
        attention.cache.write(0, slots, torch.cat([keys, values], dim=1))
        works.append(Work(one, length - 1, (1,), sampled=1))
        contents.append((length, keys, values))
    batch = build_batch(Plan(tuple(works)), block_tokens=BLOCK_TOKENS)
    query = torch.randn(len(lengths), config.heads, config.head_dim, generator=generator)

    projected = torch.cat([query, torch.zeros(len(lengths), 2 * config.kv_heads, config.head_dim)], dim=1)

    found = torch.cat([attend_group(projected, attention.cache, 0, group) for group in attention.plan(batch).groups])

    for row, work in enumerate(batch.work):
        length, keys, values = contents[works.index(work)]
        expected = reference_attend(query[row : row + 1], keys, values, torch.tensor([length - 1]))
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_tiles_of_zeros_at_the_end_change_no_bit() -> None:
    parts = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([parts, torch.zeros(2, 3, 11, 4)], dim=2)

    assert torch.equal(add_tiles(parts), add_tiles(padded))


def test_rounded_tiles_hold_the_length_and_waste_less_than_half() -> None:
    for tiles in range(1, 300):
        assert tiles <= round_tiles(tiles) <= tiles * 1.5


def test_the_probe_finds_a_product_that_depends_on_its_batch() -> None:
    """A product whose rows change with their number needs padding, or tiles of one fixed shape."""

    def uneven(x: Tensor) -> Tensor:
        return x * (1.0 if x.shape[0] % 4 == 0 else 1.0001)

    def hopeless(x: Tensor) -> Tensor:
        return x * (1.0 + x.shape[0])

    assert probe_row_multiple(lambda x: x * 2.0, 8) == 1
    assert probe_row_multiple(uneven, 8) == 4
    assert probe_row_multiple(hopeless, 8) is None


def test_a_weight_is_held_as_float16_only_if_no_bit_is_lost() -> None:
    """Times a power of two if that helps: bfloat16 has float16's digits to spare, but reaches smaller numbers."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 24, generator=generator)
    small = (weight * 1e-4).bfloat16().float()
    wide = weight.half().float() * torch.logspace(-6, 6, 24)

    assert half_exponent(weight.half().float()) == 0
    assert half_exponent(torch.zeros(4, 4)) == 0
    assert half_exponent(weight) is None
    assert half_exponent(wide) is None
    exponent = half_exponent(small)
    assert exponent
    assert torch.equal((small * 2.0**exponent).half().double() * 2.0**-exponent, small.double())
    for matrix in (weight, wide, small):
        bias = torch.randn(40, generator=generator)
        x = torch.randn(5, 24, generator=generator)
        expected = functional.linear(x.double(), matrix.double(), bias.double())
        torch.testing.assert_close(FACTORY.build(matrix, bias=bias)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_keeps_no_view_of_what_it_was_made_of() -> None:
    """Also where neither library can pack it: the file would stay mapped."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # of the last, torch's own product
        weight, x = torch.ones(32, 32, dtype=dtype), torch.ones(3, 32, dtype=dtype)
        product = LinearFactory(device=CPU, dtype=dtype).build(weight)

        weight.zero_()

        assert product(x).eq(32).all()


def test_a_product_that_is_not_there_is_said_once_a_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model has a hundred matrices: on a processor that a library refuses each would be a line of the log."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("this processor cannot\nand more")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    caplog.set_level("INFO")
    factory = LinearFactory(device=CPU, dtype=torch.bfloat16)

    kinds = [factory.build(torch.ones(32, 32 * width, dtype=torch.bfloat16)).kind for width in (1, 2, 2)]

    said = [vars(one) for one in caplog.records if "not available" in one.msg]
    assert kinds == ["plain"] * 3
    assert [(one["kind"], one["reason"]) for one in said] == [("packed", "this processor cannot")]


def test_attention_pads_rows_to_what_the_probe_finds() -> None:
    assert probe_attention(16) in MULTIPLES
    assert KV_TILE % BLOCK_TOKENS == 0


def test_llama3_scaling_leaves_fast_frequencies_and_stretches_slow_ones() -> None:
    scaled = parse_config(CONFIG | {"vocab_size": 10} | FAMILIES["llama 3 rope scaling"]).rope.frequencies
    plain = parse_config(CONFIG | {"vocab_size": 10}).rope.frequencies

    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)


@KERNELS
def test_drafts_are_rows_behind_the_last_token_and_each_is_sampled_from(kernels: str, model_dir: Path) -> None:
    """What verification of a speculation rests on: its rows have the bits that decoding would give one by one."""
    tokens = [3 + (5 * n * n + n) % 250 for n in range(140)]
    whole = chunked_logits(model_dir, kernels, tokens, chunk=1000)
    decoder = loaded(model_dir, kernels)
    pool = BlockPool(64, BLOCK_TOKENS)
    known = sequence(tokens[:130])
    other = sequence(tokens[:40])
    known.blocks, other.blocks = pool.take(5), pool.take(2)

    with torch.inference_mode():
        first = build_batch(Plan(prefill=(Work(known, 0, tuple(tokens[:129]), sampled=0),)), block_tokens=BLOCK_TOKENS)
        decoder.forward(first)
        verify = Plan(
            (Work(known, 129, tuple(tokens[129:]), sampled=11),), (Work(other, 0, tuple(tokens[:39]), sampled=0),)
        )
        batch = build_batch(verify, block_tokens=BLOCK_TOKENS)
        hidden = decoder.forward(batch)

    assert first.sample_rows.tolist() == []
    assert batch.sample_rows.tolist() == list(range(11)), "the other's chunk does not reach its last token"
    assert torch.equal(decoder.logits(hidden)[batch.sample_rows], whole[129:])
