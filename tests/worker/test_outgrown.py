"""Workers of one model with unequal contexts: an answer that one cannot hold goes on at the other, whatever breaks."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from bus.cell import Cell
from bus.codec.wire import Largest
from bus.ids import JobId
from bus.jobs import Sampling
from bus.link import LinkDown
from gpu_worker.answer_log import TOO_MANY
from gpu_worker.echo_engine import EchoEngine
from gpu_worker.engine import End, Engine
from gpu_worker.torch_engine.bridge import TorchEngine
from tests.conftest import wait_until
from tests.harness.proxies import fault_proxy
from tests.harness.servers import ValkeyServer
from tests.torch_engine.tiny import engine_config, tiny_model
from tests.worker.house import SETTINGS, House, open_house, serving
from tests.worker.test_publisher import STORED, held, holding, piece, sent

SMALL, BIG = 20, 100
PROMPT = "[[delay_ms=5 tokens=40]] one two three"
WHOLE = b" ".join([(b"one", b"two", b"three")[at % 3] for at in range(40)])


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server.url) as house:
        yield house


def node(house: House, name: str, engine: Engine, url: str = "") -> AbstractAsyncContextManager[None]:
    return serving(house, SETTINGS.changed(redis_url=url or house.url, node_id=name), engine)


def echo(context: int) -> EchoEngine:
    return EchoEngine(context_length=context)


async def begin(house: House, prompt: str, name: str, **job: object) -> JobId:
    """A job that this node gets first."""
    house.dispatching = False
    await asyncio.sleep(0.05)  # a look on its way is over
    job_id = await house.submit(prompt, **job)  # type: ignore[arg-type]  # fields of a ChatJob
    await house.assign_to(name)
    house.dispatching = True
    return job_id


def assert_answered_once(house: House, job_id: JobId, text: bytes) -> None:
    told = house.told[job_id]
    assert told.text == text, vars(told)
    assert told.faults == [] and [end.state for end in told.ends] == ["done"], vars(told)


async def test_an_answer_that_fills_the_small_context_goes_on_at_the_large_one(house: House):
    async with node(house, "small", echo(SMALL)), node(house, "big", echo(BIG)):
        job_id = await begin(house, PROMPT, "small")
        end = await house.end_of(job_id)
        small = await house.node("small")

    assert_answered_once(house, job_id, WHOLE)
    assert house.told[job_id].attempts == ["small", "big"]
    assert (end.reason, end.new_tokens, end.node) == ("stop", 40, "big")
    assert (small.failed, small.client_errors) == (0, 0)


async def test_a_prompt_between_both_contexts_always_succeeds(house: House):
    words = " ".join(f"w{number}" for number in range(50))
    async with node(house, "small", echo(SMALL)), node(house, "big", echo(BIG)):
        job_ids = [await begin(house, words, "small", max_tokens=4, stream=False) for _ in range(6)]
        ends = await house.ends_of(job_ids)

    assert {(end.state, end.text) for end in ends} == {("done", b"w0 w1 w2 w3")}


@pytest.mark.parametrize("other", [SMALL, SMALL - 5])
async def test_where_no_context_is_larger_everything_ends_as_it_would_alone(house: House, other: int):
    async with node(house, "small", echo(SMALL)), node(house, "other", echo(other)):
        long = await begin(house, PROMPT, "small")
        prompt = await begin(house, "word " * (SMALL + 1), "small")
        ends = await house.ends_of([long, prompt])

    assert [(end.state, end.reason, end.new_tokens) for end in ends] == [("done", "length", 17), ("failed", "error", 0)]
    assert WHOLE.startswith(house.told[long].text) and house.told[long].attempts == ["small"]
    assert ends[1].error_code == "context_length_exceeded" and str(SMALL) in ends[1].error_message


async def test_an_answer_at_its_max_tokens_is_no_matter_of_the_context(house: House):
    async with node(house, "small", echo(SMALL)), node(house, "big", echo(BIG)):
        job_id = await begin(house, PROMPT, "small", max_tokens=SMALL - 3)
        end = await house.end_of(job_id)

    assert (end.reason, end.new_tokens, end.node) == ("length", SMALL - 3, "small")


async def test_a_prompt_waits_for_the_large_node_that_restarts(house: House):
    async with node(house, "small", echo(SMALL)):
        async with node(house, "big", echo(BIG)):
            pass  # it says bye
        job_id = await begin(house, "word " * 50, "small", max_tokens=1)
        await asyncio.sleep(0.3)
        assert house.told[job_id].ends == []
        async with node(house, "big", echo(BIG)):
            end = await house.end_of(job_id)

    assert (end.state, end.node) == ("done", "big")


async def answer_with_lost_reply(house: House, server: ValkeyServer, nth: int) -> None:
    """The nth command of the small node from the job's submission on is executed, and its reply lost."""
    name = f"small{nth}"
    async with fault_proxy(server.port) as proxy, node(house, name, echo(SMALL), proxy.url):
        proxy.swallow_after(nth)
        job_id = await begin(house, PROMPT, name)

        await house.end_of(job_id, 15)

    print(f"reply of command {nth} swallowed: {proxy.swallowed.is_set()}, attempts {house.told[job_id].attempts}")
    assert_answered_once(house, job_id, WHOLE)


async def test_a_lost_reply_neither_loses_nor_doubles_what_goes_on_elsewhere(house: House, server: ValkeyServer):
    async with node(house, "big", echo(BIG)):
        await asyncio.gather(*(answer_with_lost_reply(house, server, nth) for nth in (6, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(1, 31))
async def test_a_reply_lost_anywhere_neither_loses_nor_doubles(house: House, server: ValkeyServer, nth: int):
    async with node(house, "big", echo(BIG)):
        await answer_with_lost_reply(house, server, nth)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("large", [True, False])
async def test_an_offer_whose_calls_fail_is_made_again(
    house: House, monkeypatch: pytest.MonkeyPatch, nth: int, executed: bool, large: bool
):
    """Between the offer and the finish there are two calls: each may be done or not when its reply is lost."""
    calls, outgrow = 0, Cell.outgrow

    async def failing(cell: Cell, *args: object) -> object:
        nonlocal calls
        calls += 1
        answer = await outgrow(cell, *args) if executed or calls > nth else None  # type: ignore[arg-type]  # as called
        if calls <= nth:
            raise LinkDown("the reply is lost", maybe_sent=executed)
        return answer

    monkeypatch.setattr(Cell, "outgrow", failing)
    async with node(house, "small", echo(SMALL)), node(house, "big", echo(BIG if large else SMALL)):
        job_id = await begin(house, PROMPT, "small")
        await house.end_of(job_id)

    text = WHOLE if large else house.told[job_id].text
    assert_answered_once(house, job_id, text)
    assert house.told[job_id].ends[0].new_tokens == (40 if large else 17)


async def test_the_torch_engines_text_is_the_same_as_alone(house: House, tmp_path: Path):
    """Greedy, to the byte, with a half character at the seam or not."""
    directory = tiny_model(tmp_path)
    asked = {"max_tokens": 120, "ignore_eos": True, "sampling": Sampling(temperature=0.0), "logprobs": 1}
    engines = {
        name: TorchEngine(dataclasses.replace(engine_config(directory, kv_tokens=tokens), model_name="echo"))
        for name, tokens in (("small", 96), ("big", 512))
    }
    async with node(house, "big", engines["big"]):
        alone = [await begin(house, f"tell me {number}", "big", **asked) for number in range(4)]
        before = await house.ends_of(alone)
        async with node(house, "small", engines["small"]):
            moved, ends = [], []
            for number in range(4):  # the small one has room for one at a time
                moved.append(await begin(house, f"tell me {number}", "small", **asked))
                ends.append(await house.end_of(moved[-1]))

    for lone, one in zip(alone, moved, strict=True):
        assert_answered_once(house, one, house.told[lone].text)
        assert house.told[one].attempts == ["small", "big"]
    lone_records = [await house.cell.logprobs(one, end.fence) for one, end in zip(alone, before, strict=True)]
    records = [await house.cell.logprobs(one, end.fence) for one, end in zip(moved, ends, strict=True)]
    assert records == lone_records and all(records)
    assert {(end.reason, end.new_tokens) for end in ends} == {("length", 120)}


# the publisher's part


OUTGROWN = End("length", prompt_tokens=2, new_tokens=3, outgrown=True, tail=b" E")


def test_what_outgrew_the_node_is_offered_once_all_of_it_is_stored_and_keeps_its_tail_back() -> None:
    job = held()
    one = holding(job)
    one.add(piece(job, b"abc", end=OUTGROWN), 1.0)

    early = one.take_outgrown()
    calls = one.take(1.0)
    one.answered(calls[0], [STORED], 1.0)
    offered, again = one.take_outgrown(), one.take_outgrown()

    assert early == [] and sent(calls) == [("flush", "c0-a", 0, b"abc")]
    assert offered == [job] and again == []
    assert job.end is None and one.running == 0
    one.end_outgrown(job)
    assert sent(one.take(1.1)) == [("finish", "c0-a", 3, b" E")]
    assert job.end == End("length", prompt_tokens=2, new_tokens=3)


def test_a_prompt_that_outgrew_the_node_is_offered_at_once() -> None:
    job = held()
    one = holding(job)

    one.add(piece(job, b"", end=End("error", outgrown=True)), 1.0)

    assert one.take(1.0) == [] and one.take_outgrown() == [job]


def test_what_outgrew_the_node_and_has_another_end_or_is_gone_is_not_offered() -> None:
    ended, gone = held("a"), held("b")
    one = holding(ended, gone)
    for job in (ended, gone):
        one.add(piece(job, b"", end=OUTGROWN), 1.0)

    one.end(ended, TOO_MANY)
    one.drop(gone.sequence)

    assert one.take_outgrown() == []
    assert sent(one.take(1.0)) == [("finish", "c0-a", 0, b"")]


async def test_a_job_that_is_dropped_while_it_is_offered_stays_dropped(house: House, monkeypatch: pytest.MonkeyPatch):
    asked = asyncio.Event()
    answer = asyncio.Event()

    async def slow(cell: Cell, job_id: JobId, *_: object) -> Largest:
        asked.set()
        await answer.wait()
        return Largest(job_id)

    monkeypatch.setattr(Cell, "outgrow", slow)
    async with node(house, "small", echo(SMALL)):
        job_id = await begin(house, PROMPT, "small")
        await asyncio.wait_for(asked.wait(), 5)
        record = await house.cell.job(job_id)
        assert record is not None
        house.dispatching = False
        await house.cell.requeue(job_id, record.fence, "drain")
        await asyncio.sleep(2 * SETTINGS.renew_ms / 1000)
        answer.set()
        await asyncio.sleep(0.1)

        assert house.told[job_id].ends == []
        house.dispatching = True
        await wait_until(lambda: len(house.told[job_id].attempts) == 2)
