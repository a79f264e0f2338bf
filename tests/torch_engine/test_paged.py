"""What the engine does on a GPU, on a CPU: all but the kernel and the recording, which simple forms stand in for."""

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bus.jobs import Sampling
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.backends import choose_ops, flash_varlen, probe_paged
from gpu_worker.torch_engine.batch import build_batch
from gpu_worker.torch_engine.core import EngineCore
from gpu_worker.torch_engine.cuda.graphs import GraphDecoder, Inputs, Recorded, bucket_sizes, choose_bucket
from gpu_worker.torch_engine.cuda.paged import (
    BLOCK_TOKENS,
    PagedAttention,
    Probed,
    VarlenAttention,
    host_calls,
    probe,
)
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.linear import LinearFactory
from gpu_worker.torch_engine.loader import load_weights
from gpu_worker.torch_engine.model import Decoder
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from gpu_worker.torch_engine.ops import PLAIN
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.runner import Runner
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence
from tests.torch_engine.reference import reference_logits
from tests.torch_engine.tiny import CONFIG, GREEDY, request, run, tiny_engine, tiny_model
from tests.torch_engine.varlen import reference_varlen

CPU = torch.device("cpu")
CONTEXT = 1024
FAMILIES: dict[str, dict[str, Any]] = {
    "shared key heads": {},
    "one query head per key head": {"num_key_value_heads": 6},
    "query and key norms": {"architectures": ["Qwen3ForCausalLM"]},
}


def paged_decoder(directory: Path, varlen: VarlenAttention = reference_varlen) -> Decoder:
    config = parse_config(json.loads((directory / "config.json").read_text()))
    layers = range(config.layers)
    weights = load_weights(
        directory, config, layers, LinearFactory(device=CPU, dtype=torch.float32), lambda fraction: None
    )
    attention = PagedAttention(
        config,
        layers,
        24,
        context=CONTEXT,
        kernel=Probed("reference", varlen, None if config.group > 1 else 1),
        ops=PLAIN,
        device=CPU,
        dtype=torch.float32,
    )
    return Decoder(config, weights, attention, dtype=torch.float32)


def graph_decoder(decoder: Decoder, capacity: int) -> GraphDecoder:
    assert isinstance(decoder.attention, PagedAttention)
    return GraphDecoder(decoder, decoder.attention, capacity=capacity, context=CONTEXT, capture=run_again)


def run_again(run: Callable[[], Tensor]) -> Recorded:
    """In place of a recording: the same inputs, the same output, everything between computed anew."""
    output = run().clone()

    def replay() -> None:
        output.copy_(run())

    return Recorded(replay, output)


def sequence(tokens: list[int], pool: BlockPool) -> Sequence:
    one = Sequence("s", tokens, len(tokens), 0, CONTEXT, SamplingChoice(0.0, 1.0, 0, 0))
    one.blocks = pool.take(pool.blocks_for(len(tokens)))
    return one


def tokens(seed: int, count: int) -> list[int]:
    return [3 + (seed * n * n + 7 * n) % 250 for n in range(count)]


def work(one: Sequence, start: int, count: int, sampled: int = 1) -> Work:
    return Work(one, start, tuple(one.tokens[start : start + count]), sampled)


def prefill(*works: Work) -> Plan:
    return Plan(prefill=works)


def expected_logits(directory: Path, prompt: list[int]) -> Tensor:
    return reference_logits(
        json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors"), prompt
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_mixed_steps_over_scattered_blocks_give_the_references_logits(family: str, tmp_path: Path) -> None:
    """Three sequences in turns of unlike sizes, so that decode rows and chunks share steps and blocks interleave."""
    directory = tiny_model(tmp_path, **FAMILIES[family])
    decoder = paged_decoder(directory)
    pool = BlockPool(24, BLOCK_TOKENS)
    long, middle, short = (sequence(tokens(n, count), pool) for n, count in ((5, 600), (3, 300), (2, 4)))
    long.blocks[0], middle.blocks[1] = middle.blocks[1], long.blocks[0]
    plans = [
        prefill(work(long, 0, 270), work(short, 0, 2)),
        Plan((work(short, 2, 1),), (work(long, 270, 329), work(middle, 0, 299))),
        Plan((work(long, 599, 1), work(middle, 299, 1), work(short, 3, 1))),
    ]
    found: dict[int, Tensor] = {}

    for plan in plans:
        batch = build_batch(plan, block_tokens=BLOCK_TOKENS)
        logits = decoder.logits(decoder.forward(batch))
        for piece, done in zip(batch.pieces, batch.work, strict=True):
            found[id(done.sequence)] = logits[piece.first_row + piece.count - 1]

    for one in (long, middle, short):
        expected = expected_logits(directory, one.tokens)[-1]
        assert (found[id(one)].double() - expected).abs().max() < 1e-3 * expected.abs().max()


def test_pieces_of_one_row_and_others_are_two_calls(model_dir: Path) -> None:
    """A chunk of one row behind a longer one stays with the chunks, since rows of a call are neighbours."""
    pool = BlockPool(24, BLOCK_TOKENS)
    one, two = sequence(tokens(1, 300), pool), sequence(tokens(2, 40), pool)
    mixed = build_batch(Plan((work(two, 39, 1),), (work(one, 0, 299), work(two, 0, 1))), block_tokens=BLOCK_TOKENS)
    chunks = build_batch(prefill(work(one, 0, 299)), block_tokens=BLOCK_TOKENS)

    decode, rest = host_calls(mixed.pieces)

    assert (decode.rows, decode.rows_max, decode.length_max) == (slice(0, 1), 1, 40)
    assert (rest.rows, rest.rows_max, rest.length_max) == (slice(1, 301), 299, 299)
    assert rest.row_starts.tolist() == [0, 299, 300]
    assert rest.lengths.tolist() == [299, 1]
    assert rest.block_table.tolist() == [one.blocks, [two.blocks[0], 0]]
    assert [call.decodes for call in host_calls(chunks.pieces)] == [False]


@torch.inference_mode()
def test_replayed_decode_steps_are_those_computed_one_by_one(model_dir: Path) -> None:
    """Rows come and go, so that each step finds another step's numbers in the buffers."""
    plain, graphs = paged_decoder(model_dir), graph_decoder(paged_decoder(model_dir), capacity=10)
    pool = BlockPool(24, BLOCK_TOKENS)
    sequences = [sequence(tokens(n, 250 + n), pool) for n in range(1, 11)]
    for model in (plain, graphs):
        model.forward(build_batch(prefill(*(work(one, 0, 240, 0) for one in sequences)), block_tokens=BLOCK_TOKENS))

    for at, running in enumerate([(0, 1, 2), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (4,), (9, 0), (5, 6, 7, 8, 9)], 240):
        batch = build_batch(Plan(tuple(work(sequences[n], at, 1) for n in running)), block_tokens=BLOCK_TOKENS)
        torch.testing.assert_close(graphs.forward(batch), plain.forward(batch))


@torch.inference_mode()
def test_rows_of_padding_write_into_the_null_block_alone(model_dir: Path) -> None:
    graphs = graph_decoder(paged_decoder(model_dir), capacity=8)
    attention = graphs.decoder.attention
    assert isinstance(attention, PagedAttention)
    pool = BlockPool(24, BLOCK_TOKENS)
    owned = [sequence(tokens(n, 260), pool) for n in range(5)]
    graphs.forward(build_batch(prefill(*(work(one, 0, 256, 0) for one in owned)), block_tokens=BLOCK_TOKENS))
    before = [cache.clone() for cache in attention.keys]

    graphs.forward(build_batch(Plan(tuple(work(one, 256, 1) for one in owned)), block_tokens=BLOCK_TOKENS))

    for old, new in zip(before, attention.keys, strict=True):
        changed = {tuple(at) for at in (old != new).any(-1).any(-1).nonzero().tolist()}
        assert changed <= {(0, 0)} | {(one.blocks[1], 0) for one in owned}
        assert {(one.blocks[1], 0) for one in owned} <= changed


@torch.inference_mode()
def test_steps_with_chunks_or_drafts_or_too_many_rows_are_not_replayed(model_dir: Path) -> None:
    replayed: list[int] = []

    def count(run: Callable[[], Tensor]) -> Recorded:
        output = run().clone()
        return Recorded(lambda: replayed.append(output.shape[0]), output)

    decoder = paged_decoder(model_dir)
    assert isinstance(decoder.attention, PagedAttention)
    graphs = GraphDecoder(decoder, decoder.attention, capacity=4, context=CONTEXT, capture=count)
    pool = BlockPool(24, BLOCK_TOKENS)
    some = [sequence(tokens(n, 20), pool) for n in range(6)]

    def forward(plan: Plan) -> int:
        return graphs.forward(build_batch(plan, block_tokens=BLOCK_TOKENS)).shape[0]

    assert forward(prefill(work(some[0], 0, 9))) == 9
    assert forward(Plan((work(some[0], 9, 3, sampled=3),))) == 3
    assert forward(Plan(tuple(work(one, 0, 1) for one in some))) == 6
    assert not replayed
    assert forward(Plan(tuple(work(one, 0, 1) for one in some[:3]))) == 3
    assert replayed == [4]


def test_a_bucket_holds_the_rows_and_the_last_is_the_capacity() -> None:
    for capacity in (1, 2, 3, 4, 5, 8, 10, 64, 100, 256):
        sizes = bucket_sizes(capacity)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == capacity
        for rows in range(1, capacity + 1):
            bucket = choose_bucket(rows, sizes)
            assert bucket is not None
            assert rows <= bucket < rows + max(8, rows)
        assert choose_bucket(capacity + 1, sizes) is None


def test_inputs_are_views_of_one_buffer_that_do_not_overlap() -> None:
    buffer = torch.zeros(Inputs.size(5, 3), dtype=torch.int64)
    inputs = Inputs.carve(buffer, 5, 3)
    views = [getattr(inputs, field.name) for field in dataclasses.fields(inputs)]

    for n, view in enumerate(views, 1):
        view.fill_(n)

    assert [set(view.flatten().tolist()) for view in views] == [{1}, {2}, {3}, {4}, {5}, {6}]
    assert inputs.block_table.shape == (5, 3)
    assert inputs.key_starts.shape == (6,)


def test_blocks_are_cleared(model_dir: Path) -> None:
    decoder = paged_decoder(model_dir)
    attention = decoder.attention
    assert isinstance(attention, PagedAttention)
    for cache in (*attention.keys, *attention.values):
        cache.fill_(float("nan"))

    decoder.clear([2, 5])

    for cache in (*attention.keys, *attention.values):
        assert cache[[2, 5]].count_nonzero() == 0
        assert cache[[1, 3]].isnan().all()


class TestProbe:
    """What this torch gets wrong is found at start, not in an answer."""

    config = parse_config(CONFIG | {"vocab_size": 10})
    alone = parse_config(CONFIG | {"vocab_size": 10, "num_key_value_heads": 6})

    def found(self, kernel: VarlenAttention, config: ModelConfig = config) -> Probed | str:
        return probe("it", kernel, config, CPU, torch.float32)

    def test_a_right_kernel_may_choose_its_splits_where_heads_share_keys(self) -> None:
        assert self.found(reference_varlen) == Probed("it", reference_varlen, None)
        assert self.found(reference_varlen, self.alone) == Probed("it", reference_varlen, 1)

    def test_a_kernel_that_is_wrong_when_split_is_kept_from_it(self) -> None:
        def wrong_when_split(query: Tensor, *others: Any, num_splits: int | None, **more: Any) -> Tensor:
            result = reference_varlen(query, *others, num_splits=num_splits, **more)
            if num_splits is None:
                result[1:] = float("nan")  # as in pytorch issue 194167
            return result

        assert self.found(wrong_when_split) == Probed("it", wrong_when_split, 1)

    def test_a_wrong_or_missing_kernel_is_not_used(self) -> None:
        def aligned_to_the_first_key(query: Tensor, *others: Any, **more: Any) -> Tensor:
            return query

        def missing(*others: Any, **more: Any) -> Tensor:
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

        assert self.found(aligned_to_the_first_key) == "its results are wrong"
        assert self.found(missing) == "RuntimeError: FlashAttention only supports Ampere GPUs or newer."

    def test_a_torch_whose_kernel_takes_other_arguments_is_no_error(self) -> None:
        def before_pages(query: Tensor, *others: Tensor | int, scale: float) -> Tensor:
            return query

        assert "unexpected keyword argument" in str(self.found(cast(VarlenAttention, before_pages)))


class TestChoice:
    def test_torchs_kernel_takes_what_we_give_it_and_logs_no_line_a_call(self) -> None:
        """By its signature: the kernel itself needs a GPU."""
        kernel = flash_varlen()
        names = list(inspect.signature(reference_varlen).parameters)

        inspect.signature(kernel).bind(**dict.fromkeys(names))

        assert not logging.getLogger(kernel.__module__).isEnabledFor(logging.INFO)

    def test_float32_goes_through_the_tiles(self) -> None:
        assert "no kernel" in str(probe_paged(TestProbe.config, torch.device("cuda"), torch.float32))

    def test_the_first_kernel_that_is_right_is_used_and_the_log_says_why(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def missing() -> VarlenAttention:
            raise ModuleNotFoundError("No module named 'triton'")

        def wrong() -> VarlenAttention:
            return lambda query, *others, **more: query

        kernels = {"a": wrong, "b": missing, "c": lambda: reference_varlen, "d": missing}

        found = probe_paged(TestProbe.config, CPU, torch.bfloat16, kernels)

        assert found == Probed("c", reference_varlen, None)
        [line] = caplog.records
        assert line.__dict__["kernel"] == "c"
        assert line.__dict__["reason"] == "a: its results are wrong; b: No module named 'triton'"

    def test_where_no_kernel_is_right_every_reason_is_said(self) -> None:
        found = probe_paged(TestProbe.config, CPU, torch.bfloat16)

        assert "FlashAttention: " in str(found)
        assert "Triton: " in str(found)

    @pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
    def test_without_triton_operations_stay_plain_and_the_log_says_why(self, caplog: pytest.LogCaptureFixture) -> None:
        assert choose_ops(CPU, torch.float32) is PLAIN
        assert "Triton" in caplog.text


class TestEngine:
    """Whole answers through replayed steps, with the next step launched before the last one is read."""

    texts = tuple(f"{n} " + "the river and the mill " * (5 * n) for n in range(6))

    def paged_engine(self, directory: Path, blocks: int = 24) -> Assembled:
        model = graph_decoder(paged_decoder(directory), capacity=4)
        whole = tiny_engine(directory)
        core = EngineCore(
            Runner(model, device=CPU, depth=1),
            Scheduler(BlockPool(blocks, BLOCK_TOKENS), capacity=4, chunk_max=100),
            eos=whole.text.eos,
        )
        return dataclasses.replace(whole, core=core, model=model)

    @pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.95, top_k=50)])
    def test_the_same_tokens_as_through_tiles(self, model_dir: Path, sampling: Sampling) -> None:
        wanted = [request(str(n), text, seed=n, sampling=sampling) for n, text in enumerate(self.texts)]
        expected = run(tiny_engine(model_dir), wanted)

        found = run(self.paged_engine(model_dir), wanted)

        assert {name: one.tokens for name, one in found.items()} == {name: one.tokens for name, one in expected.items()}

    def test_a_prefix_is_found_again_in_whole_blocks(self, model_dir: Path) -> None:
        engine = self.paged_engine(model_dir)
        text = "the mill turns by day and by night " * 12
        first = run(engine, [request("a", text)])["a"]

        again = run(engine, [request("b", text)])["b"]

        assert again.tokens == first.tokens
        assert engine.core.scheduler.pool.idle

    def test_preempted_for_want_of_blocks_they_lose_nothing(self, model_dir: Path) -> None:
        wanted = [request(str(n), f"{n} " + "and on " * 50, max_tokens=60) for n in range(4)]
        expected = run(tiny_engine(model_dir), wanted)
        tight = self.paged_engine(model_dir, blocks=5)

        found = run(tight, wanted)

        assert {name: one.tokens for name, one in found.items()} == {name: one.tokens for name, one in expected.items()}
        assert tight.core.scheduler.preemptions
