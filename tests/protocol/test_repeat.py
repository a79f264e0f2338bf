"""Scripts are safe to repeat: each call is made twice, as by a caller whose first reply was swallowed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from bus.ids import GatewayId, NodeId
from bus.link import Link, Script
from tests.protocol.world import MODEL, World, chat, make_world

READS = {"look", "nodes", "job"}


class RepeatingLink:
    """Sends every script twice and answers with the second reply; everything else is the real link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> asyncio.Future[Any]:
        if script.name not in READS:
            self._link.script(script, keys, args).add_done_callback(lambda done: done.exception())
        return self._link.script(script, keys, args)


async def plain_job(world: World) -> None:
    one = await world.start(key_id="k", quota_max=5, address="me", stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2])
    await world.finish(one, 3, b"def", prompt_tokens=2, new_tokens=4)


async def node_error_and_retry(world: World) -> None:
    one = await world.start(stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2])
    await world.cell.requeue(one.job_id, one.fence, "node_error", "broke")
    await world.link.send("HSET", world.cell.keys.node(NodeId("n1")), "breaker_n", 0, "breaker_until", 0)
    await world.age_late()
    await world.sweep()
    await world.dispatch()
    (two,) = await world.read("n1")
    await world.finish(two, 3, b"def")


async def three_crashes(world: World) -> None:
    one = await world.start()
    for _ in range(3):
        await world.cell.requeue(one.job_id, one.fence, "crash")
        await world.dispatch()
        found = await world.read("n1")
        one = found[0] if found else one


async def cancels(world: World) -> None:
    queued = await world.submit()
    await world.cell.cancel(queued, "me")
    one = await world.start()
    await world.cell.cancel(one.job_id, "me")
    await world.finish(one)


async def take_over(world: World) -> None:
    one = await world.start(stream=True)
    await world.cell.attach(one.job_id, GatewayId("g2"), "gateway:g2")
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch()
    (two,) = await world.read("n1")
    await world.finish(two)


async def death_and_return(world: World) -> None:
    one = await world.start()
    await world.flush(one, 0, b"abc")
    await world.cell.down(NodeId("n1"), one.owner)
    await world.cell.lease("d1")
    await world.cell.own(NodeId("n2"), "n2")


async def deadlines(world: World) -> None:
    for job_id in (await world.submit(), (await world.start()).job_id):
        await world.age_deadline(job_id)
    await world.sweep()


async def what_no_node_can_do(world: World) -> None:
    asking = replace(chat(), logprobs=0)
    one, waiting = await world.start(job=asking), await world.submit(job=asking)
    await world.cell.requeue(one.job_id, one.fence, "unable", "it has none", "logprobs")
    record = await world.cell.job(waiting)
    assert record is not None
    await world.cell.end_unserved(waiting, record.fence)
    assert [await world.state(job_id) for job_id in (one.job_id, waiting)] == ["failed", "failed"]


async def outgrown(world: World) -> None:
    used, world.cell.link = world.cell.link, world.link
    await world.beat("n1", capacity=3, context_length=256)
    await world.node("n2", context_length=512)
    world.cell.link = used
    one = await world.start("n1", stream=True)
    await world.flush(one, 0, b"abc", 0, [1])
    await world.cell.outgrow(one.job_id, one.fence, 256)
    await world.dispatch("n2")
    (two,) = await world.read("n2")
    await world.cell.outgrow(two.job_id, two.fence, 512)
    await world.finish(two, 3, reason="length")
    prompt = await world.start("n1")
    await world.cell.outgrow(prompt.job_id, prompt.fence, 256)
    await world.link.send("ZREM", world.cell.keys.model(MODEL), "n2")
    await world.cell.end_unserved(prompt.job_id, prompt.fence)
    await world.dispatch("n1")
    (again,) = await world.read("n1")
    await world.finish(again, reason="error", error_code="context_length_exceeded", fault="client")


SCENARIOS = [
    *(plain_job, node_error_and_retry, three_crashes, cancels, take_over, death_and_return, deadlines),
    *(what_no_node_can_do, outgrown),
]


def without_chance(value: Any) -> Any:
    """Nonces, entry ids and times differ from run to run."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        return "#" if any(mark in text for mark in (".", "-")) or text.isdigit() else text
    return value


async def observe(world: World) -> list[Any]:
    """What any reader of the cell would see, without times and nonces."""
    keys = world.cell.keys
    seen: list[Any] = []
    for raw in sorted(await world.link.send("KEYS", "*:job:*")):
        if raw.count(b":") == 3:
            h = await world.link.send("HMGET", raw, "state", "crashes", "node_errors", "alone", "error_code", "avoid")
            seen.append((raw.rpartition(b"-")[2], *h))
    for stream in (keys.out("gateway:g1"), keys.out("gateway:g2"), keys.dead, keys.node_jobs(NodeId("n1"))):
        entries = await world.link.send("XRANGE", stream, "-", "+")
        seen.append([[without_chance(part) for part in fields] for _, fields in entries])
    for zset in (
        keys.deadlines,
        keys.late,
        keys.quota("k"),
        keys.node_running(NodeId("n1")),
        keys.node_running(NodeId("n2")),
    ):
        seen.append(await world.link.send("ZCARD", zset))
    seen.append(await world.link.send("HGETALL", keys.usage("me")))
    view = await world.cell.node(NodeId("n1"))
    seen.append(view and (view.ok, view.failed, view.breaker_n, round(view.failure, 4)))
    return seen


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
async def test_every_call_made_twice_changes_what_one_call_changes(
    link: Link, scenario: Callable[[World], Awaitable[None]]
):
    seen = []
    for used in (link, RepeatingLink(link)):
        await link.send("FLUSHALL")
        world = await make_world(link)
        await world.node(capacity=3)
        await world.end_grace()
        world.cell.link = used  # type: ignore[assignment]  # stands in for the link
        await scenario(world)
        world.cell.link = link
        seen.append(await observe(world))

    once, twice = seen

    # Detaching and telling a worker to stop may be said twice; both are no-ops for who hears them again.
    assert [drop_markers(part) for part in twice] == [drop_markers(part) for part in once]


def drop_markers(part: Any) -> Any:
    """An attach repeated appends its marker again, with the same figures: harmless, so left out of the comparison."""
    if not isinstance(part, list):
        return part
    return [entry for entry in part if not (isinstance(entry, list) and "marker" in entry)]
