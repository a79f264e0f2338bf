"""The reply of the Nth command is swallowed, for every N until a run passes untouched: nobody knows, nothing is lost.

The dispatcher and the registry consumer reach the server through a proxy that executes the command and then breaks the
connection. After each run the invariants hold: one end a job, nothing pending, nothing waiting, no dead letter.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from bus.cell import Cell
from bus.codec.events import NodeRegistered
from bus.ids import NodeId
from bus.link import Link
from bus.process.child import ParentLine
from bus.settings import Settings
from dispatcher.service import run as run_dispatcher
from registry_consumer.service import run as run_registry
from tests.conftest import wait_until
from tests.dispatcher.hands import HandNode
from tests.harness.proxies import FaultProxy, fault_proxy
from tests.harness.servers import ValkeyServer

BODY = '{"model":"m","messages":[{"role":"user","content":"Hello"}]}'
JOBS = 3
COMMANDS_MAX = 400  # a role that never gets through a run untouched is stuck


@pytest.fixture
async def proxy(server: ValkeyServer) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
async def cell(link: Link, settings: Settings) -> Cell:
    """Reaches the server directly: only the role under test meets faults."""
    return Cell(link, 0, settings.changed(out_ttl_ms=600_000))


async def dispatch_a_few(cell: Cell, proxy: FaultProxy, settings: Settings, nth: int) -> bool:
    """One run with the nth reply swallowed. True if there were that many commands."""
    await cell.link.send("FLUSHALL")
    node = await HandNode.join(cell, "a", capacity=2)
    proxy.swallow_after(nth)
    parent = ParentLine()
    through = settings.changed(redis_url=proxy.url)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(_until_stopped(through, parent))
        for index in range(JOBS):
            await cell.link.send("XADD", cell.keys.jobs, "*", "job", BODY, "id", f"j{index}", "reply", "all")
        ends: Counter[bytes] = Counter()
        while len(ends) < JOBS:
            await node.finish(await node.take())
            await asyncio.sleep(0.01)
            ends = await _ends(cell)
        parent.stop.set()
    swallowed = proxy.swallowed.is_set()
    proxy.swallow_reply_of = None

    assert set((await _ends(cell)).values()) == {1}, nth
    assert await cell.link.send("XLEN", cell.keys.jobs) == 0
    assert await node.running() == 0
    assert await cell.link.send("XLEN", cell.keys.dead) == 0
    return swallowed


async def _until_stopped(settings: Settings, parent: ParentLine) -> None:
    """As its parent does: a role that ends with a lost link is started again."""
    while not parent.stop.is_set():
        try:
            await run_dispatcher(settings, parent)
        except Exception:
            await asyncio.sleep(0.05)


async def _ends(cell: Cell) -> Counter[bytes]:
    entries = await cell.link.send("XRANGE", cell.keys.reply("all"), "-", "+")
    found = [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries]
    return Counter(fields[b"job"] for fields in found if fields[b"type"] == b"end" and fields[b"state"] == b"done")


@pytest.mark.parametrize("nth", [3, 17, 24, 31])
async def test_a_swallowed_reply_costs_the_dispatcher_no_job(
    cell: Cell, proxy: FaultProxy, settings: Settings, nth: int
) -> None:
    await dispatch_a_few(cell, proxy, settings, nth)


@pytest.mark.slow
async def test_whichever_reply_is_swallowed_every_job_ends_once(
    cell: Cell, proxy: FaultProxy, settings: Settings
) -> None:
    for nth in range(1, COMMANDS_MAX):
        if not await dispatch_a_few(cell, proxy, settings, nth):
            return
    pytest.fail(f"more than {COMMANDS_MAX} commands")


async def register_a_few(cell: Cell, proxy: FaultProxy, settings: Settings, nth: int) -> bool:
    await cell.link.send("FLUSHALL")
    proxy.swallow_after(nth)
    parent = ParentLine()
    through = settings.changed(redis_url=proxy.url)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(_registry_until_stopped(through, parent))
        for name in ("a", "b", "c"):
            event = NodeRegistered(
                NodeId(name), 1, "k", "http://10.0.0.1:1", ("m",), layers=(0,), answer_to="gateway:g", answer_id=name
            )
            await cell.publish_node_event(event)
        await wait_until(lambda: _all_known(cell))
        await wait_until(lambda: _nothing_left(cell))
        parent.stop.set()
    swallowed = proxy.swallowed.is_set()
    proxy.swallow_reply_of = None

    assert await cell.link.send("XLEN", cell.keys.dead) == 0
    answers = await cell.link.send("XRANGE", cell.keys.out("gateway:g"), "-", "+")
    statuses = {dict(zip(flat[::2], flat[1::2], strict=True))[b"status"] for _, flat in answers}
    assert statuses == {b"applied"}, "a registration that was applied twice says so"
    return swallowed


async def _registry_until_stopped(settings: Settings, parent: ParentLine) -> None:
    while not parent.stop.is_set():
        try:
            await run_registry(settings, parent)
        except Exception:
            await asyncio.sleep(0.05)


async def _all_known(cell: Cell) -> bool:
    return [view.node for view in await cell.nodes() if view.alive] == ["a", "b", "c"]


async def _nothing_left(cell: Cell) -> bool:
    pending = await cell.link.send("XPENDING", cell.keys.nodes, "registry_consumer")
    return int(pending[0]) == 0 and int(await cell.link.send("XLEN", cell.keys.nodes)) == 0


@pytest.mark.parametrize("nth", [3, 12, 15, 19])
async def test_a_swallowed_reply_costs_the_registry_no_registration(
    cell: Cell, proxy: FaultProxy, settings: Settings, nth: int
) -> None:
    await register_a_few(cell, proxy, settings, nth)


@pytest.mark.slow
async def test_whichever_reply_is_swallowed_every_registration_is_applied(
    cell: Cell, proxy: FaultProxy, settings: Settings
) -> None:
    for nth in range(1, COMMANDS_MAX):
        if not await register_a_few(cell, proxy, settings, nth):
            return
    pytest.fail(f"more than {COMMANDS_MAX} commands")
