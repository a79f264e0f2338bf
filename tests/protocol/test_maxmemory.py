"""A full server refuses new work only. All that ends, frees or keeps alive what it holds must go through, or its memory
would never drain: a worker that cannot renew fences itself, and so does the next."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from bus.codec.events import NodeBye, NodeDrain
from bus.codec.wire import LockTaken
from bus.ids import GatewayId, JobId, NodeId
from bus.link import Link, Script
from bus.scripts import script_names
from tests.protocol.test_declared_keys import everything_else
from tests.protocol.test_front_door import knock
from tests.protocol.test_repeat import SCENARIOS
from tests.protocol.world import GATEWAY, World, make_world

MAY_REFUSE = {"submit", "admit", "idem"}


class FullServer:
    """The link to a server whose memory is full for each command but those that bring new jobs."""

    def __init__(self, link: Link, may_refuse: set[str] = MAY_REFUSE) -> None:
        self.ran: set[str] = set()
        self._link = link
        self._may_refuse = may_refuse

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> asyncio.Future[Any]:
        self.ran.add(script.name)
        if script.name in self._may_refuse:
            return self._link.script(script, keys, args)
        return self._full(lambda: self._link.script(script, keys, args))

    def send(self, *words: Any) -> asyncio.Future[Any]:
        return self._full(lambda: self._link.send(*words))

    def _full(self, act: Callable[[], asyncio.Future[Any]]) -> asyncio.Future[Any]:
        """Three commands of one connection, executed in this order."""
        self._link.send("CONFIG", "SET", "maxmemory", 1).add_done_callback(lambda done: done.exception())
        sent = act()
        self._link.send("CONFIG", "SET", "maxmemory", 0).add_done_callback(lambda done: done.exception())
        return sent


async def what_operators_and_time_do(world: World) -> None:
    """What the other scenarios leave out: registration, drain, departure, foreign entries, lone reservations."""
    cell, keys, n1 = world.cell, world.cell.keys, NodeId("n1")
    entry, submission = await knock(world)
    await cell.admit(entry, submission)
    entry, _ = await knock(world)
    await cell.reject(entry, "bad_request", "no JSON", "reply:p1", JobId("c0-p9"), {})
    await world.submit("named", tenant="t", idem_key="k", body_digest="d")
    await world.link.send("ZADD", keys.deadlines, 1000, b"\xff")
    await world.link.send("ZADD", keys.node_running(n1), 1000, "c0-gone/1.a")
    foreign = (await world.link.send("XADD", keys.wake, "*", "a", "b")).decode()
    await cell.dead_letter(keys.wake, foreign, "foreign", {"a": b"b"})
    await world.link.send("XGROUP", "CREATECONSUMER", keys.node_jobs(n1), "workers", "n1.old")
    assert await world.publish(NodeDrain(n1, int(world.holders[n1].rpartition(".")[2]))) == "applied"
    await cell.drain_node(n1, world.holders[n1])
    lock = await cell.lock_node(NodeId("h2"), 1000)
    assert isinstance(lock, LockTaken)
    await cell.unlock_node(NodeId("h2"), lock.epoch)
    relay = await world.http_node("h1")
    await cell.drain_node(NodeId("h1"), relay)
    await cell.adopt(NodeId("h1"), relay)
    await world.link.send("DEL", keys.node_alive(NodeId("h1")))
    view = await cell.node(NodeId("h1"))
    assert view is not None and await cell.note_silent(NodeId("h1"), view.last_beat_ms)
    assert await world.publish(NodeBye(NodeId("h1"), view.epoch, "k1")) == "applied"
    await cell.attach(await world.submit("theirs"), GatewayId("g3"), "gateway:g3")
    await cell.drop_lease(GATEWAY)
    assert (await world.sweep()).removed_nodes == (NodeId("h1"),)
    assert await world.state(JobId("c0-named")) == "cancelled"


async def a_flushed_server(world: World) -> None:
    """The node's hash is gone: who comes first becomes owner."""
    holder = world.holders[NodeId("n1")]
    await world.link.send("DEL", world.cell.keys.node(NodeId("n1")))
    await world.cell.renew(NodeId("n1"), holder, [])


async def a_delayed_job_and_a_job_alone(world: World) -> None:
    one = await world.start(stream=True)
    other = await world.start()
    for _ in range(2):
        await world.cell.requeue(one.job_id, one.fence, "crash")
        await world.dispatch()
        one = next(iter(await world.read("n1")), one)
    await world.finish(other)
    await world.dispatch()


async def test_at_maxmemory_every_script_but_those_that_bring_new_jobs_goes_through(link: Link):
    ran: set[str] = set()
    for scenario in (
        *SCENARIOS,
        everything_else,
        what_operators_and_time_do,
        a_flushed_server,
        a_delayed_job_and_a_job_alone,
    ):
        await link.send("FLUSHALL")
        world = await make_world(link)
        world.cell.link = full = FullServer(link)  # type: ignore[assignment]  # stands in for the link
        await world.node(capacity=3)
        await world.end_grace()
        await scenario(world)
        ran |= full.ran

    assert ran == set(script_names())


async def test_at_maxmemory_a_submit_is_refused_with_the_reason(link: Link):
    """Control: the stand-in above does fill the server's memory."""
    world = await make_world(link)
    await world.node()
    world.cell.link = FullServer(link, may_refuse=set())  # type: ignore[assignment]  # stands in for the link

    plain = await world.refused()
    named = await world.refused(tenant="t", idem_key="k", body_digest="d")

    assert (plain.code, named.code) == ("memory_full", "memory_full")
