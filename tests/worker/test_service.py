"""A worker on a real server: jobs end once, with the whole text, whatever happens around them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from bus.child import ParentLine
from bus.ids import NodeId
from bus.settings import Settings
from gpu_worker.worker import run
from tests.harness.servers import ValkeyServer
from tests.worker.house import SETTINGS, House, open_house

Start = Callable[..., AbstractAsyncContextManager[ParentLine]]


@asynccontextmanager
async def worker(house: House, node: str = "w1", **changes: object) -> AsyncIterator[ParentLine]:
    """A worker in this process; drained when the block is left."""
    settings: Settings = SETTINGS.changed(redis_url=house.url, node_id=node, **changes)
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
