"""The engine from asyncio's side: nothing blocks, nothing is lost, and no failure is silent."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpu_worker.engine import EngineStartError, GenerateRequest, Piece
from gpu_worker.torch_engine.assembly import Assembled, assemble
from gpu_worker.torch_engine.bridge import EngineFailed, TorchEngine, merge
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.core import StepReport
from gpu_worker.torch_engine.tiles import TileAttention
from tests.torch_engine.tiny import Outcome, engine_config, request, torch_decoder

DEADLINE_S = 20.0


@contextlib.asynccontextmanager
async def running(directory: Path, **changes: object) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(engine_config(directory, **changes))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def collect(
    engine: TorchEngine, wanted: list[GenerateRequest], *, until: Callable[[dict[str, Outcome]], bool]
) -> dict[str, Outcome]:
    outcomes = {one.sequence: Outcome(one) for one in wanted}
    async with asyncio.timeout(DEADLINE_S):
        async for batch in engine.batches():
            assert len({piece.sequence for piece in batch}) == len(batch), "two pieces of one sequence in one batch"
            for piece in batch:
                outcomes[piece.sequence].take(piece)
            if until(outcomes):
                break
    return outcomes


def all_ended(outcomes: dict[str, Outcome]) -> bool:
    return all(outcome.end is not None for outcome in outcomes.values())


async def test_every_sequence_gets_its_pieces_and_one_end(model_dir: Path) -> None:
    wanted = [request(str(n), f"hello {n}") for n in range(20)]
    async with running(model_dir, capacity=4) as engine:
        for one in wanted:
            engine.submit(one)

        outcomes = await collect(engine, wanted, until=all_ended)

        assert [outcome.end.reason for outcome in outcomes.values() if outcome.end] == ["length"] * 20
        assert all(len(outcome.tokens) == 24 for outcome in outcomes.values())
        assert engine.load().idle


async def test_info_says_what_a_registration_needs(model_dir: Path) -> None:
    engine = TorchEngine(engine_config(model_dir, warm_up=True))
    info = await engine.start()
    load = engine.load()
    await engine.close()

    assert (info.kind, info.models, info.context_length, info.capacity, info.layers) == (
        "torch",
        ("tiny",),
        1024,
        16,
        (0, 1, 2),
    )
    assert len(info.resume_digest) == 32
    assert load.prefill_rate > 0
    assert load.decode_rate > 0


async def test_a_bad_request_ends_like_any_other(model_dir: Path) -> None:
    wanted = [request("long", "x" * 100_000), request("good", "hello")]
    async with running(model_dir) as engine:
        for one in wanted:
            engine.submit(one)

        outcomes = await collect(engine, wanted, until=all_ended)

    assert outcomes["long"].end is not None
    assert outcomes["long"].end.error_code == "context_length_exceeded"


async def test_a_cancel_ends_within_a_step(model_dir: Path) -> None:
    wanted = [request("a", "hello", max_tokens=900)]
    async with running(model_dir) as engine:
        engine.submit(wanted[0])
        await collect(engine, wanted, until=lambda seen: len(seen["a"].tokens) > 0)

        engine.cancel("a")
        before = len((await collect_rest(engine))[-1].tokens)

    assert before <= 900


async def collect_rest(engine: TorchEngine) -> list[Piece]:
    pieces: list[Piece] = []
    async with asyncio.timeout(DEADLINE_S):
        async for batch in engine.batches():
            pieces += batch
            if any(piece.end is not None for piece in batch):
                break
    assert pieces[-1].end is not None
    assert pieces[-1].end.reason == "cancelled"
    return pieces


async def test_a_cancel_that_overtakes_the_tokenizer_still_counts(model_dir: Path) -> None:
    wanted = [request("a", "hello", max_tokens=900)]
    async with running(model_dir) as engine:
        engine.submit(wanted[0])
        engine.cancel("a")

        outcomes = await collect(engine, wanted, until=all_ended)

    assert outcomes["a"].end is not None
    assert outcomes["a"].end.reason == "cancelled"
    assert len(outcomes["a"].tokens) < 900


async def test_a_crash_of_the_step_thread_reaches_the_reader(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose third layer is gone: the step fails in the middle."""

    def without_its_end(config: TorchEngineConfig) -> Assembled:
        whole = assemble(config)
        attention = torch_decoder(whole).attention
        assert isinstance(attention, TileAttention)
        attention.cache.layers.pop()
        return whole

    engine = TorchEngine(engine_config(model_dir, kernels="torch"), assemble=without_its_end)
    await engine.start()
    engine.submit(request("a", "hello"))

    with pytest.raises(EngineFailed) as raised:
        await collect(engine, [request("a", "hello")], until=all_ended)
    await engine.close()

    assert isinstance(raised.value.__cause__, IndexError)
    assert "engine thread failed" in caplog.text


async def test_closing_ends_the_batches_and_both_threads(model_dir: Path) -> None:
    engine = TorchEngine(engine_config(model_dir))
    await engine.start()
    engine.submit(request("a", "hello", max_tokens=900))
    reader = asyncio.create_task(collect_until_closed(engine))
    await asyncio.sleep(0)

    await engine.close()

    async with asyncio.timeout(DEADLINE_S):
        await reader
    assert not any(thread.is_alive() for thread in engine._threads)


async def collect_until_closed(engine: TorchEngine) -> None:
    async for _ in engine.batches():
        pass


async def test_work_is_visible_from_the_submit_on_and_gone_after_the_end(model_dir: Path) -> None:
    """The lease follows this: a step that hangs must not look idle, and an idle hour must not look like a hang."""
    wanted = [request("a", "hello", max_tokens=5)]
    async with running(model_dir) as engine:
        before_s = time.monotonic()
        assert engine.load().idle

        engine.submit(wanted[0])
        busy = engine.load()
        await collect(engine, wanted, until=all_ended)
        after = engine.load()

    assert not busy.idle
    assert busy.last_progress_s >= before_s
    assert after.idle


async def test_refusing_is_progress_too(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that end without a step, one always open: not a hang, for which the node would be given up."""
    too_long = request("b", "x" * 100_000)
    async with running(model_dir) as engine:
        assert engine._assembled is not None
        monkeypatch.setattr(engine._assembled.core, "step", StepReport)
        engine.submit(request("a", "hello"))
        opened_s = time.monotonic()

        engine.submit(too_long)
        await collect(engine, [too_long], until=all_ended)
        load = engine.load()

    assert not load.idle
    assert load.last_progress_s >= opened_s


async def test_an_engine_that_never_started_closes(model_dir: Path) -> None:
    await TorchEngine(engine_config(model_dir)).close()


async def test_the_engine_waits_for_a_reader_that_stopped_taking(model_dir: Path) -> None:
    """The outbox is bounded: without a reader the engine produces so much and no more, and goes on when read again."""
    wanted = [request("a", "hello", max_tokens=200)]
    engine = TorchEngine(engine_config(model_dir), outbox_tokens_max=10)
    await engine.start()
    engine.submit(wanted[0])
    await asyncio.sleep(0.5)  # many times what ten tokens take; a slow machine only makes the test weaker

    outcomes = await collect(engine, wanted, until=all_ended)
    await engine.close()

    assert len(outcomes["a"].pieces[0].tokens) <= 12
    assert len(outcomes["a"].tokens) == 200


async def test_more_sequences_than_the_engine_holds_are_a_node_error(model_dir: Path) -> None:
    engine = TorchEngine(engine_config(model_dir), open_max=1)
    wanted = [request(str(n), "hello", max_tokens=1) for n in range(3)]
    for one in wanted:
        engine.submit(one)  # nobody takes from the intake before start
    await engine.start()

    outcomes = await collect(engine, wanted, until=all_ended)
    await engine.close()

    assert [o.end.error_code for o in outcomes.values() if o.end] == ["", "node_error", "node_error"]


async def test_a_missing_model_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"config\.json"):
        await TorchEngine(engine_config(tmp_path)).start()


def test_merged_pieces_are_one_piece() -> None:
    first = Piece("a", 3, b"xy", 1, (7,))
    second = Piece("a", 5, b"z", 2, (8, 9))

    assert merge(first, second) == Piece("a", 3, b"xyz", 1, (7, 8, 9))
