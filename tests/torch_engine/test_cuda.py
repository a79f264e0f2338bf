"""What only a GPU can show. Everything else of that path is tested on a CPU, in test_paged.py and test_pipeline.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bus.jobs import Sampling
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.backends import probe_paged, triton_varlen
from gpu_worker.torch_engine.batch import build_batch
from gpu_worker.torch_engine.cuda.graphs import GraphDecoder
from gpu_worker.torch_engine.cuda.paged import BLOCK_TOKENS, Probed
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.runner import Flight
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence
from tests.torch_engine.tiny import CONFIG, GREEDY, request, run, tiny_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
TEXTS = tuple(f"{n} " + "the river and the mill " * (9 * n) for n in range(8))
CAPACITY = 12
HEADS = [(32, 8, 128), (9, 3, 64), (32, 32, 128), (14, 2, 64), (6, 2, 16), (16, 8, 256), (20, 1, 80)]


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Assembled:
    return tiny_engine(model_dir, device="cuda", dtype="bfloat16", kv_tokens=32 * BLOCK_TOKENS, capacity=CAPACITY)


def config_of(heads: tuple[int, int, int]) -> ModelConfig:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": heads[2]}
    return parse_config(CONFIG | {"vocab_size": 10} | shape)


def graphs_of(engine: Assembled) -> GraphDecoder:
    assert isinstance(engine.model, GraphDecoder), "the probe refused every kernel on this GPU"
    return engine.model


def sequences(count: int, pool: BlockPool, sampling: SamplingChoice | None = None) -> list[Sequence]:
    found = []
    for n in range(count):
        tokens = [3 + (5 * k * k + n * k) % 250 for k in range(270 + n)]
        one = Sequence("s", tokens, len(tokens), 0, 1024, sampling or SamplingChoice(0.0, 1.0, 0, 0))
        one.blocks = pool.take(2)
        found.append(one)
    return found


def chunk(one: Sequence, count: int) -> Work:
    return Work(one, 0, tuple(one.tokens[:count]), 0)


def next_row(one: Sequence, at: int, *, late: bool = False) -> Work:
    return Work(one, at, (0,) if late else (one.tokens[at],), 1, late=late)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_greedy_tokens_in_float32_as_on_a_cpu(model_dir: Path) -> None:
    wanted = [request(str(n), text) for n, text in enumerate(TEXTS)]
    expected = run(tiny_engine(model_dir), wanted)

    found = run(tiny_engine(model_dir, device="cuda", dtype="float32"), wanted)

    assert {name: one.tokens for name, one in found.items()} == {name: one.tokens for name, one in expected.items()}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_right_for_heads_of_known_models(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    found = probe_paged(config_of(heads), torch.device("cuda"), dtype)

    assert isinstance(found, Probed), found


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_own_kernel_is_right_too(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    found = probe_paged(config_of(heads), torch.device("cuda"), dtype, {"Triton": triton_varlen})

    assert isinstance(found, Probed), found


@torch.inference_mode()
def test_every_recorded_step_gives_what_its_operations_give_one_by_one(engine: Assembled) -> None:
    """For each number of rows, and so for each graph, in falling order: padding meets numbers of larger steps."""
    graphs = graphs_of(engine)
    pool = BlockPool(31, BLOCK_TOKENS)
    some = sequences(CAPACITY, pool)
    graphs.forward(build_batch(Plan(prefill=tuple(chunk(one, 256) for one in some)), block_tokens=BLOCK_TOKENS))

    for rows in range(CAPACITY, 0, -1):
        batch = build_batch(Plan(tuple(next_row(one, 256) for one in some[:rows])), block_tokens=BLOCK_TOKENS)
        expected = graphs.decoder.forward(batch).clone()
        found = graphs.forward(batch)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_launch_waits_for_the_device(engine: Assembled, temperature: float) -> None:
    """Decode steps, late ones too, and a step with a chunk; with log probabilities, filters and penalties."""
    runner = engine.core.runner
    pool = BlockPool(31, BLOCK_TOKENS)
    choice = SamplingChoice(temperature, 0.9, 40, 7, presence_penalty=0.5, repetition_penalty=1.1, logprobs=3)
    some = sequences(5, pool, choice)
    flight: Flight | None = None
    plans = [
        Plan(prefill=tuple(chunk(one, 256) for one in some[:4])),
        Plan(tuple(next_row(one, 256) for one in some[:4])),
        Plan(tuple(next_row(one, 257, late=True) for one in some[:3])),
        Plan(tuple(next_row(one, 258, late=True) for one in some[:2]), (chunk(some[4], 100),)),
    ]
    for plan in plans:  # once without watching: memory, kernels and libraries are set up
        flight = runner.launch(plan, flight)
    assert flight is not None
    runner.read(flight)

    flight = None
    for plan in plans:
        with waiting_is_an_error():
            flight = runner.launch(plan, flight)

    assert flight is not None
    assert all(result.finite for result in runner.read(flight))


def test_whole_answers_are_reproducible_and_follow_their_prompts(engine: Assembled) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50)
    for chosen in (GREEDY, sampling):
        wanted = [request(str(n), text, seed=n, sampling=chosen) for n, text in enumerate(TEXTS)]
        first = {name: one.tokens for name, one in run(engine, wanted).items()}

        assert all(len(tokens) == 24 for tokens in first.values())
        assert len({tuple(tokens) for tokens in first.values()}) > 1
    assert engine.core.idle


@torch.inference_mode()
def test_bfloat16_logits_are_near_the_cpus_float32(engine: Assembled, model_dir: Path) -> None:
    graphs = graphs_of(engine)
    cpu = tiny_engine(model_dir).model
    pool, cpu_pool = BlockPool(31, BLOCK_TOKENS), BlockPool(31, cpu.block_tokens)
    [one] = sequences(1, pool)
    batch = build_batch(Plan(prefill=(chunk(one, 200),)), block_tokens=BLOCK_TOKENS)
    found = graphs.logits(graphs.forward(batch)).cpu()
    one.blocks = cpu_pool.take(cpu_pool.blocks_for(200))
    expected = cpu.logits(cpu.forward(build_batch(Plan(prefill=(chunk(one, 200),)), block_tokens=cpu.block_tokens)))

    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.min() > 0.95
    assert cosine.mean() > 0.99
