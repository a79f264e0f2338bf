"""Dispatchers as real processes, killed while 200 jobs run: every job ends exactly once."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.cell import Cell
from bus.link import Link
from bus.settings import Settings
from tests.conftest import wait_until
from tests.harness.fleet import QUICK, Fleet
from tests.harness.servers import ValkeyServer

JOBS = 200
DOOR = "millrace:{c0}:jobs"
BODY = '{"model":"echo","messages":[{"role":"user","content":"[[tokens=8 delay_ms=10]] one two three"}]}'


@pytest.fixture
def fleet(server: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    """A registry consumer and an echo worker with less room than there are jobs; no dispatcher yet."""
    with Fleet(server.url, tmp_path, model="echo", capacity=32) as running:
        running.start("registry_consumer")
        running.start("gpu_worker", "--engine", "echo", node_id="echo-1")
        yield running


@pytest.fixture
def cell(link: Link) -> Cell:
    return Cell(link, 0, Settings().changed(**QUICK))


async def push_jobs(cell: Cell) -> None:
    """As a plain producer does; all answers come on one reply stream."""
    await wait_until(lambda: cell.link.send("EXISTS", "millrace:{c0}:node:echo-1:alive"), timeout_s=20)
    pushes = [
        cell.link.send("XADD", DOOR, "*", "job", BODY, "id", f"j{index}", "reply", "all") for index in range(JOBS)
    ]
    await asyncio.gather(*pushes)


async def ends(cell: Cell) -> Counter[bytes]:
    """How many terminals each job has; only good ones count."""
    found: Counter[bytes] = Counter()
    for _, flat in await cell.link.send("XRANGE", "millrace:{c0}:reply:all", "-", "+"):
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if fields[b"type"] == b"end":
            assert fields[b"state"] == b"done" and fields[b"text"] == b"one two three one two three one two", fields
            found[fields[b"job"]] += 1
    return found


async def all_ended(cell: Cell) -> bool:
    return len(await ends(cell)) == JOBS


async def some_ended(cell: Cell) -> bool:
    return len(await ends(cell)) >= JOBS // 10


async def check_all_ended_once(cell: Cell) -> None:
    await wait_until(lambda: all_ended(cell), timeout_s=30, step_s=0.05)
    assert set((await ends(cell)).values()) == {1}
    assert await cell.link.send("XLEN", DOOR) == 0
    assert await cell.link.send("XLEN", "millrace:{c0}:queue:echo:1") == 0
    assert await cell.link.send("ZCARD", "millrace:{c0}:node:echo-1:running") == 0
    assert await cell.link.send("XLEN", "millrace:{c0}:dead") == 0


async def test_the_only_dispatcher_is_killed_again_and_again_and_its_parent_restarts_it(
    fleet: Fleet, cell: Cell
) -> None:
    dispatcher = fleet.start("dispatcher")
    await push_jobs(cell)
    await wait_until(lambda: some_ended(cell), timeout_s=20)
    for _ in range(3):
        dispatcher.kill_child()
        await asyncio.sleep(0.2)

    await check_all_ended_once(cell)


async def test_one_of_two_dispatchers_is_lost_with_its_machine(fleet: Fleet, cell: Cell) -> None:
    """Its lease lives on for a while; the other serves its queues before that, and takes what it had read."""
    dispatchers = [fleet.start("dispatcher") for _ in range(2)]
    for dispatcher in dispatchers:
        dispatcher.child_pid()
    await push_jobs(cell)
    await wait_until(lambda: some_ended(cell), timeout_s=20)
    dispatchers[0].kill()

    await check_all_ended_once(cell)
