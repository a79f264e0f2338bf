"""A worker on a real server: jobs end once, with the whole text, whatever happens around them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock

import pytest

from bus.cell import Cell
from bus.codec.entries import parse_assignment
from bus.codec.wire import Superseded
from bus.ids import ModelName, NodeId
from bus.jobs import ChatJob, Message, encode_job
from bus.process.child import ParentLine
from bus.process.exits import leaves
from bus.settings import Settings
from gpu_worker.publisher import EngineFault
from gpu_worker.service import NodeService
from gpu_worker.worker import run
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer
from tests.worker.house import SETTINGS, House, open_house


@asynccontextmanager
async def worker(house: House, node: str = "w1", url: str = "", **changes: object) -> AsyncIterator[ParentLine]:
    """A worker in this process; drained when the block is left. url: another way to the house's server."""
    settings: Settings = SETTINGS.changed(redis_url=url or house.url, node_id=node, **changes)
    parent = ParentLine()
    running = asyncio.create_task(run(settings, parent))
    try:
        await house.wait_for_node(node)
        yield parent
        parent.stop.set()
        await asyncio.wait_for(asyncio.shield(running), 10)
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=5)


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server.url) as house:
        yield house


async def test_a_job_is_answered_with_frames_and_one_end(house: House):
    async with worker(house):
        job_id = await house.submit("[[delay_ms=40]] one two three four")
        end = await house.end_of(job_id)

        told = house.told[job_id]
        assert told.text == b"one two three four" == await house.whole_text(job_id)
        assert (end.state, end.reason, end.new_tokens, end.node) == ("done", "stop", 4, "w1")
        assert len(told.ends) == 1 and told.faults == []


async def test_many_short_jobs_all_end_and_leave_nothing_behind(house: House):
    async with worker(house, capacity=32):
        jobs = [await house.submit(f"job {number}", stream=False, max_tokens=2) for number in range(100)]
        ends = await house.ends_of(jobs)

        assert [end.text for end in ends] == [f"job {number}".encode() for number in range(100)]
        keys, node = house.cell.keys, NodeId("w1")
        assert await house.cell.link.send("ZCARD", keys.node_running(node)) == 0
        assert await house.cell.link.send("XLEN", keys.node_jobs(node)) == 0
        assert (await house.cell.link.send("XPENDING", keys.node_jobs(node), "workers"))[0] == 0
    assert all(len(told.ends) == 1 for told in house.told.values())


async def test_a_long_prompt_and_a_resumed_text_are_fetched(house: House):
    """Over 8 KiB the payload does not travel in the entry."""
    async with worker(house):
        words = " ".join(f"word{number}" for number in range(2000))
        job_id = await house.submit(words)

        assert (await house.end_of(job_id)).state == "done"
        assert await house.whole_text(job_id) == words.encode()


async def test_a_cancelled_job_frees_its_slot_and_ends_as_cancelled(house: House):
    async with worker(house, capacity=1):
        slow = await house.submit("[[delay_ms=50 tokens=2000]] a")
        await wait_until(lambda: house.told[slow].text)

        await house.cell.cancel(slow, "test")
        end = await house.end_of(slow)
        after = await house.submit("next")

        assert end.state == "cancelled"
        assert (await house.end_of(after)).state == "done"


async def test_a_job_past_its_deadline_is_stopped_in_the_engine(house: House):
    async with worker(house, capacity=1):
        slow = await house.submit("[[delay_ms=50 tokens=2000]] a", deadline_ms=600)
        after = await house.submit("next")

        assert (await house.end_of(slow)).state == "failed"
        assert (await house.end_of(after)).state == "done"
        assert len(house.told[slow].ends) == 1


async def test_a_client_error_fails_at_once_with_its_code_and_does_not_blame_the_node(house: House):
    async with worker(house):
        job_id = await house.submit("[[fail_at=1 fault=client delay_ms=5]] a b")
        end = await house.end_of(job_id)
        node = await house.node("w1")

        assert (end.state, end.error_code, len(house.told[job_id].attempts)) == ("failed", "bad_request", 1)
        assert (node.failed, node.client_errors) == (0, 1)


async def test_a_node_error_is_tried_elsewhere_until_the_limit(house: House):
    """The engine's fault is not the client's: other nodes get their chance, each resuming what is there."""
    async with worker(house, "w1"), worker(house, "w2"):
        job_id = await house.submit("[[fail_at=2 delay_ms=5]] a b c")
        end = await house.end_of(job_id)

        told = house.told[job_id]
        assert end.state == "failed" and len(told.attempts) == SETTINGS.node_errors_max
        assert set(told.attempts) == {"w1", "w2"}
        assert told.text == b"a b" and told.faults == []


async def test_a_foreign_entry_is_put_away_with_its_reason_and_hurts_nobody(house: House):
    async with worker(house):
        key = house.cell.keys.node_jobs(NodeId("w1"))
        await house.cell.link.send("XADD", key, "*", "what", "is this")
        await house.cell.link.send("XADD", house.cell.keys.node_control(NodeId("w1")), "*", "type", "dance")
        job_id = await house.submit("good neighbour")

        assert (await house.end_of(job_id)).state == "done"
        await wait_until(lambda: dead_letters(house, 2))
        assert await house.cell.link.send("XLEN", key) == 0
        assert (await house.cell.link.send("XPENDING", key, "workers"))[0] == 0


@pytest.mark.parametrize(("text", "tokens"), [(b"", ()), (b"abc", (5, 6))])
async def test_tokens_without_text_are_said_again(
    monkeypatch: pytest.MonkeyPatch, text: bytes, tokens: tuple[int, ...]
):
    """Half a character, or what may become a stop string: their log probabilities have not come along."""
    cell = AsyncMock(Cell)
    cell.payload.return_value, cell.text.return_value = b"a long one", text
    cell.tokens.return_value, cell.logprobs_len.return_value = (5, 6), 40
    begin = AsyncMock()
    monkeypatch.setattr(NodeService, "_begin", begin)
    service = object.__new__(NodeService)
    service._cell = cell
    fields = {
        "job": "c0-a",
        "fence": "2.a",
        "owner": "w.1",
        "route": "gateway:g g x y",
        "payload": "",
        "spec": "m l keep 1 1 9999999999999 1 1",
        "text_len": str(len(text)),
        "token_len": "2",
    }
    assignment = parse_assignment("1-1", {name: value.encode() for name, value in fields.items()})

    await service._fetch_and_begin(assignment, 0.0)

    begin.assert_awaited_once_with(assignment, b"a long one", text, tokens, 0.0, 40 if text else 0)


@pytest.mark.parametrize("odd", [{}, {"owner": "other.1"}, {"payload": b""}, {"text_len": "5"}, {"text_len": "-7"}])
async def test_a_well_formed_entry_of_no_attempt_is_put_away(house: House, odd: dict[str, str | bytes]):
    """Its job is unknown, so no script ever deletes it: it would stay pending, and be read at each reconnect."""
    async with worker(house):
        node = await house.node("w1")
        entry: dict[str, str | bytes] = {
            "job": "c0-g",
            "fence": "1.a",
            "owner": node.owner,
            "route": "gateway:g g x y",
            "spec": "echo s keep 1 1 9999999999999 1 1",
            "text_len": "0",
            "token_len": "0",
            "payload": encode_job(ChatJob(ModelName("echo"), messages=(Message("user", "hi there"),))),
            **odd,
        }
        key = house.cell.keys.node_jobs(NodeId("w1"))
        await house.cell.link.send("XADD", key, "*", *(word for pair in entry.items() for word in pair))

        await wait_until(lambda: dead_letters(house, 1))
        assert await house.cell.link.send("XLEN", key) == 0
        assert (await house.cell.link.send("XPENDING", key, "workers"))[0] == 0
        job_id = await house.submit("good neighbour")
        assert (await house.end_of(job_id)).state == "done"


async def dead_letters(house: House, count: int) -> bool:
    return bool(await house.cell.link.send("XLEN", house.cell.keys.dead) == count)


async def test_a_payload_that_is_no_job_ends_it_and_blames_nobody(house: House):
    """No node of this release can read it, so trying others would only close their breakers."""
    async with worker(house):
        house.dispatching = False
        job_id = await house.submit("fine once")
        await house.cell.link.send("HSET", house.cell.keys.job(job_id), "payload", b"\xc1garbage")
        house.dispatching = True

        end = await house.end_of(job_id)
        node = await house.node("w1")

        assert (end.state, end.error_code, len(house.told[job_id].attempts)) == ("failed", "bad_payload", 1)
        assert node.failed == 0
        await wait_until(lambda: dead_letters(house, 1))


async def test_a_draining_worker_finishes_or_hands_back_and_loses_no_token(house: House):
    async with worker(house, "w2", capacity=1):
        async with worker(house, "w1", capacity=3):
            jobs = [await house.submit(f"[[delay_ms=40 tokens=25]] j{number} x y") for number in range(4)]
            await wait_until(lambda: all(house.told[job].text for job in jobs))

        ends = await house.ends_of(jobs)

        assert {end.state for end in ends} == {"done"}
        for number, job in enumerate(jobs):
            words = [f"j{number}", "x", "y"]
            assert house.told[job].text == " ".join(words[at % 3] for at in range(25)).encode()
            assert house.told[job].faults == [] and len(house.told[job].ends) == 1
        records = [await house.cell.job(job) for job in jobs]
        assert [record.crashes for record in records if record] == [0] * 4
        gone = await house.node("w1")
        assert gone is None or not gone.usable(0)


async def test_a_drain_order_stops_new_work_and_keeps_the_process(house: House):
    async with worker(house, "w1"):
        await house.cell.link.send("XADD", house.cell.keys.node_control(NodeId("w1")), "*", "type", "drain")

        async def is_draining() -> bool:
            return bool((await house.node("w1")).state == "draining")

        await wait_until(is_draining)


async def test_after_a_flushall_the_node_is_whole_within_two_beats(house: House):
    async with worker(house):
        await house.cell.link.send("FLUSHALL")

        await house.wait_for_node("w1", timeout_s=2 * SETTINGS.beat_ms / 1000 + 0.5)
        job_id = await house.submit("again")

        assert (await house.end_of(job_id)).state == "done"


async def test_a_worker_that_lost_its_node_drops_everything(house: House):
    settings = SETTINGS.changed(redis_url=house.url, node_id="w1")
    running = asyncio.create_task(run(settings, ParentLine()))
    await house.wait_for_node("w1")
    job_id = await house.submit("[[delay_ms=50 tokens=100]] a")
    await wait_until(lambda: house.told[job_id].text)
    node = await house.node("w1")

    await house.cell.drop_lease(node.owner)
    await house.cell.own(NodeId("w1"), "usurper")

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(running, 5)
    assert any(isinstance(leaf, Superseded) for leaf in leaves(caught.value))


@pytest.mark.slow
async def test_a_stalled_engine_loses_its_lease_and_its_jobs_and_then_its_process(house: House):
    """Alive but deaf must lapse, or it eats jobs for ever; and a GPU that hangs needs a new process."""
    settings = SETTINGS.changed(redis_url=house.url, node_id="w1", stall_limit_ms=2_000)
    async with worker(house, "w2"):
        running = asyncio.create_task(run(settings, ParentLine()))
        await house.wait_for_node("w1")
        house.dispatching = False
        stuck = await house.submit("[[stall=1 delay_ms=5]] a b", deadline_ms=8_000)
        neighbour = await house.submit("[[delay_ms=20 tokens=60]] n")
        await house.assign_to("w1")
        await wait_until(lambda: house.told[stuck].text)

        async def is_lapsed() -> bool:
            return not (await house.node("w1")).leased

        await wait_until(is_lapsed, 8)
        await house.cell.cancel(stuck, "test")  # or it would stall the other one too
        house.dispatching = True

        end = await house.end_of(neighbour)
        assert (end.state, end.node) == ("done", "w2")
        assert house.told[neighbour].text == b"n" + b" n" * 59 and house.told[neighbour].faults == []
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(running, 8)
        assert any(isinstance(leaf, EngineFault) for leaf in leaves(caught.value))


async def test_a_blocked_event_loop_does_not_cost_the_lease(house: House):
    """The lease has a thread of its own; a long garbage collection or a big prompt must not look like death."""
    async with worker(house):
        job_id = await house.submit("[[delay_ms=100 tokens=5]] a")
        await wait_until(lambda: house.told[job_id].text)

        time.sleep(SETTINGS.lease_ms / 1000 + 0.5)  # noqa: ASYNC251 - the point of this test

        assert (await house.node("w1")).leased
        await house.end_of(job_id)
        record = await house.cell.job(job_id)
        assert record is not None and record.crashes == 0 and len(house.told[job_id].attempts) == 1
