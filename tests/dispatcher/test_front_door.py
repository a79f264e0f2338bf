"""The front door as a plain producer sees it: XADD with any client, flat fields back, every bad entry answered."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import redis.asyncio

from bus.cell import Cell
from bus.ids import cell_of_model
from bus.link import Link
from bus.settings import Settings
from tests.conftest import wait_until
from tests.dispatcher.conftest import Dispatching
from tests.dispatcher.hands import HandNode
from tests.harness.servers import ValkeyServer

DOOR, DEAD = "millrace:{c0}:jobs", "millrace:{c0}:dead"


@pytest.fixture
async def producer(server: ValkeyServer) -> AsyncIterator[Any]:
    """What anybody has: a client that knows nothing of us."""
    async with redis.asyncio.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


def chat(**fields: object) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **fields}
    return orjson.dumps(body).decode()


async def answers(producer: Any, name: str, kind: str = "end", count: int = 1) -> list[dict[str, str]]:
    """The first `count` entries of this type on the reply stream; waits for them."""
    found: list[dict[str, str]] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            entries = await producer.xrange(f"millrace:{{c0}}:reply:{name}")
            found = [fields for _, fields in entries if fields["type"] == kind]
            await asyncio.sleep(0.01)
    return found


async def serve(node: HandNode, text: bytes = b"Good day") -> None:
    """Take and end one job."""
    await wait_until(node.running)
    await node.finish(await node.take(), text)


async def test_a_job_pushed_with_a_plain_xadd_is_answered_on_its_reply_stream(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    node = await HandNode.join(cell, "a")
    async with dispatching():
        entry_id = await producer.xadd(DOOR, {"job": chat()})
        await serve(node)
        (end,) = await answers(producer, f"c0-{entry_id}")

    assert (end["job"], end["state"], end["reason"], end["text"]) == (f"c0-{entry_id}", "done", "stop", "Good day")
    assert await producer.xlen(DOOR) == 0
    assert await producer.pttl(f"millrace:{{c0}}:reply:c0-{entry_id}") > 0


async def test_a_streamed_job_with_its_own_id_and_reply_name_gets_frames(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    node = await HandNode.join(cell, "a")
    async with dispatching():
        await producer.xadd(DOOR, {"job": chat(stream=True), "id": "order-7", "reply": "billing"})
        await serve(node)
        (frame,) = await answers(producer, "billing", "frame")
        (end,) = await answers(producer, "billing")

    assert (frame["job"], frame["offset"], frame["text"]) == ("c0-order-7", "0", "Good day")
    assert end["state"] == "done"


async def test_a_second_entry_with_the_same_id_is_told_the_state_of_the_first(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    node = await HandNode.join(cell, "a")
    async with dispatching():
        await producer.xadd(DOOR, {"job": chat(), "id": "order-7"})
        await wait_until(node.running)
        await producer.xadd(DOOR, {"job": chat(), "id": "order-7", "reply": "second"})
        (end,) = await answers(producer, "second")

    assert (end["state"], end["reason"]) == ("duplicate", "running")
    assert await node.running() == 1


async def test_a_job_of_another_cell_is_told_which(
    link: Link, settings: Settings, dispatching: Dispatching, producer: Any
) -> None:
    models = [f"model-{index}" for index in range(20)]
    elsewhere = next(model for model in models if cell_of_model(model, 3) != 0)
    async with dispatching(cells=3):
        await producer.xadd(DOOR, {"job": chat(model=elsewhere), "id": "x"})
        (end,) = await answers(producer, "c0-x")

    assert end["error_code"] == "wrong_cell"
    assert f"millrace:{{c{cell_of_model(elsewhere, 3)}}}:jobs" in end["error_message"]


async def test_a_model_that_nobody_serves_is_refused_with_the_reason(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    async with dispatching():
        await producer.xadd(DOOR, {"job": chat(), "id": "x"})
        (end,) = await answers(producer, "c0-x")

    assert (end["state"], end["error_code"]) == ("failed", "no_model")


async def test_what_does_not_fit_is_answered_full(cell: Cell, dispatching: Dispatching, producer: Any) -> None:
    """Both bounds: of the front door itself, and of the model's queue."""
    await HandNode.join(cell, "a", capacity=1)
    for index in range(10):
        await producer.xadd(DOOR, {"job": chat(), "id": f"x{index}", "reply": "all"})
    async with dispatching(front_door_max=8, queue_max=4):
        ends = await answers(producer, "all", count=5)

    assert {end["error_code"] for end in ends} == {"full"}


MALFORMED: list[dict[str, str | bytes]] = [
    {"hello": "world"},
    {"job": ""},
    {"job": "not json"},
    {"job": "[]"},
    {"job": b"\xff\xfe\x00"},
    {"job": '{"messages": 5}'},
    {"job": '{"model": "m", "messages": []}'},
    {"job": '{"model": "bad name!", "messages": [{"role": "user", "content": "x"}]}'},
    {"job": '{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'},
    {"job": chat(max_tokens=-1)},
    {"job": chat(max_tokens=10**12)},
    {"job": chat(temperature="hot")},
    {"job": chat(), "foreign": "field"},
    {"job": "[" * 5_000},
    {"job": "x" * (9 * 1024 * 1024)},
]


async def test_malformed_entries_of_every_kind_are_answered_and_their_neighbours_live(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    """Each becomes one dead letter and one answer; none crashes the dispatcher or comes again."""
    node = await HandNode.join(cell, "a")
    await producer.xadd(DOOR, {"job": chat(), "id": "before"})
    for index, fields in enumerate(MALFORMED):
        await producer.xadd(DOOR, {**fields, "id": f"bad{index}"})
    await producer.xadd(DOOR, {"job": chat(), "id": "bad id!", "reply": "bad-id"})
    await producer.xadd(DOOR, {"job": chat(), "reply": "bad reply!", "id": "bad-reply"})
    await producer.xadd(DOOR, {"job": chat(), "id": "after"})

    async with dispatching():
        for index in range(len(MALFORMED)):
            (end,) = await answers(producer, f"c0-bad{index}")
            assert end["state"] == "failed" and end["error_code"] and end["error_message"], MALFORMED[index]
        assert (await answers(producer, "bad-id"))[0]["error_code"] == "invalid_value"
        assert (await answers(producer, "c0-bad-reply"))[0]["error_code"] == "invalid_value"
        await wait_until(lambda: _runs(node, 2))

    letters = await producer.xrange(DEAD)
    assert len(letters) == len(MALFORMED) + 2
    assert all(fields["source"] == "jobs" and fields["reason"] for _, fields in letters)
    assert await producer.xlen(DOOR) == 0
    assert (await producer.xpending(DOOR, "dispatcher"))["pending"] == 0


async def _runs(node: HandNode, count: int) -> bool:
    return await node.running() == count


async def test_a_reply_name_that_is_no_stream_costs_only_its_own_job(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    node = await HandNode.join(cell, "a")
    await producer.set("millrace:{c0}:reply:mine", "a string")
    await producer.xadd(DOOR, {"job": chat(), "reply": "mine"})
    await producer.xadd(DOOR, {"job": chat(), "id": "good"})
    async with dispatching():
        await wait_until(lambda: _runs(node, 1))
        await wait_until(lambda: _dead(producer, 1))


async def _dead(producer: Any, count: int) -> bool:
    return int(await producer.xlen(DEAD)) == count


async def test_what_a_dead_dispatcher_had_read_is_admitted_by_another(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    node = await HandNode.join(cell, "a", capacity=50)
    await producer.xgroup_create(DOOR, "dispatcher", "0", mkstream=True)
    for index in range(20):
        await producer.xadd(DOOR, {"job": chat(), "id": f"x{index}"})
    await producer.xreadgroup("dispatcher", "dispatcher:dead", {DOOR: ">"}, count=12)

    async with dispatching():
        await wait_until(lambda: _runs(node, 20))

    assert await producer.xlen(DOOR) == 0


async def test_an_entry_that_the_server_refuses_is_answered_and_holds_up_nobody(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    """A foreign key in the place of its job: read again for ever, it would stop the whole front door."""
    node = await HandNode.join(cell, "a", capacity=20)
    await producer.set("millrace:{c0}:job:c0-bad", "not a hash")
    async with dispatching():
        await producer.xadd(DOOR, {"job": chat(), "id": "bad"})
        (end,) = await answers(producer, "c0-bad")
        for index in range(6):
            await producer.xadd(DOOR, {"job": chat(), "id": f"good{index}"})
        await wait_until(lambda: _runs(node, 6))

    assert (end["state"], end["error_code"]) == ("failed", "server_error")
    assert "WRONGTYPE" in end["error_message"]
    assert await _dead(producer, 1)
    assert await producer.xlen(DOOR) == 0


async def test_a_refusal_is_read_as_a_sentence_on_the_reply_stream(
    cell: Cell, dispatching: Dispatching, producer: Any
) -> None:
    async with dispatching():
        await producer.xadd(DOOR, {"job": chat(), "id": "x"})
        (end,) = await answers(producer, "c0-x")

    assert end["error_message"] == "no node serves the model m"
