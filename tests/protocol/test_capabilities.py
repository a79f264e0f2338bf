"""What not every node can do: a job that asks for it goes only to nodes that can, and is refused where none can."""

import asyncio
import re

import pytest

from bus.cell import Cell
from bus.cell.jobs import REASONS
from bus.codec.entries import Assignment, parse_wake
from bus.codec.events import NodeBye, NodeRegistered
from bus.codec.spec import FLAG_OF
from bus.codec.wire import Assigned, Ended, NotAssigned, NotYours, Refused, Requeued
from bus.ids import NodeId
from bus.jobs import is_able
from bus.keys import QueueName
from bus.link import to_entry
from bus.scripts import load_script
from tests.protocol.test_logprobs import asking
from tests.protocol.world import MODEL, SETTINGS, World

LOGPROBS = ("logprobs",)


async def refuse(world: World, one: Assignment, lacks: bool = True) -> Requeued | Ended | NotYours:
    return await world.cell.requeue(one.job_id, one.fence, "unable", "it has none", "logprobs" if lacks else None)


async def again(world: World, one: Assignment, *nodes: str) -> Assignment:
    (assigned,) = await world.dispatch(*nodes)
    assert isinstance(assigned, Assigned), assigned
    return next(found for found in await world.read(assigned.node) if found.job_id == one.job_id)


async def view(world: World, node: str = "n1"):
    found = await world.cell.node(NodeId(node))
    assert found is not None
    return found


async def fall_silent(world: World, node: str) -> None:
    """Its beats have stopped long ago; it is still known."""
    await world.link.send("DEL", world.cell.keys.node_alive(NodeId(node)))
    await world.link.send("ZADD", world.cell.keys.model(MODEL), 1000, node)


async def forget_refusals(world: World, node: str) -> None:
    await world.link.send("HSET", world.cell.keys.node(NodeId(node)), "cannot", "logprobs:1000")


# what nodes say


async def test_a_beat_and_a_registration_say_what_a_node_can_do_and_one_that_does_not_say_is_asked(world: World):
    await world.node("all", can=LOGPROBS)
    await world.node("none", can=())
    await world.node("old")
    await world.http_node("h1")
    lock = await world.cell.lock_node(NodeId("h1"), 1000)
    before = await view(world, "h1")
    await world.publish(
        NodeRegistered(NodeId("h1"), lock.epoch, "k1", "http://n/", models=(MODEL,), can=LOGPROBS)  # type: ignore[union-attr]
    )

    said = {name: (await view(world, name)).can for name in ("all", "none", "old", "h1")}

    assert before.can is None
    assert said == {"all": LOGPROBS, "none": (), "old": None, "h1": LOGPROBS}
    assert [is_able(can, (), LOGPROBS) for can in said.values()] == [True, False, True, True]


async def test_a_later_releases_names_are_kept(world: World):
    """A registry of this release must not hide them from dispatchers of the next one."""
    await world.node(can=("logprobs", "tools"))

    assert (await view(world)).can == ("logprobs", "tools")


async def test_a_node_that_can_do_more_than_before_is_a_wake(world: World):
    await world.node(can=())
    await world.link.send("DEL", world.cell.keys.wake)
    await world.beat("n1", can=())
    assert await world.link.send("XLEN", world.cell.keys.wake) == 0

    await world.beat("n1", can=LOGPROBS)

    assert await world.link.send("XLEN", world.cell.keys.wake) == 1


def test_scripts_and_python_have_the_same_names():
    source = load_script("submit").source
    for name, flag in FLAG_OF.items():
        assert f"{flag} = '{name}'" in source


# who gets the job


async def test_the_queue_and_the_wake_say_what_a_job_asks_for_and_others_have_no_field_more(world: World):
    await world.node(can=LOGPROBS)
    await world.submit("asks", job=asking())
    await world.submit("plain")

    (queue,) = (await world.cell.look()).queues
    wakes = [parse_wake(to_entry(raw)[1]) for raw in await world.link.send("XRANGE", world.cell.keys.wake, "-", "+")]
    raw = await world.link.send("XRANGE", world.cell.keys.queue(QueueName("m:1")), "-", "+")

    assert [job.needs for job in queue.heads] == [LOGPROBS, ()]
    assert [wake.head.needs for wake in wakes if wake.head is not None] == [LOGPROBS, ()]
    assert ["needs" in to_entry(one)[1] for one in raw] == [True, False]


async def test_assign_passes_over_a_node_that_cannot_whatever_its_caller_believes(world: World):
    await world.node("n1", can=(), capacity=9)
    await world.node("n2", can=LOGPROBS, capacity=1)
    await world.submit("one", job=asking())
    await world.submit("two", job=asking())
    await world.submit("plain")

    replies = await world.dispatch("n1", "n2")

    assert [(one.node if isinstance(one, Assigned) else one.why) for one in replies] == ["n2", "no_room", "n1"]


async def test_a_job_that_must_run_alone_waits_for_a_node_that_can(world: World):
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n2", job=asking())
    for _ in range(2):
        await world.cell.requeue(one.job_id, one.fence, "crash")
        one = await again(world, one, "n2") if (await world.cell.job(one.job_id)).crashes < 2 else one  # type: ignore[union-attr]
    await world.node("n1", can=())

    alone = await world.dispatch("n1")
    other = await world.dispatch("n1", "n2")

    assert alone == [NotAssigned(one.job_id, "no_room", LOGPROBS)]
    assert isinstance(other[0], Assigned) and other[0].node == "n2"


async def test_an_avoided_node_that_can_is_not_passed_over_for_one_that_cannot(world: World):
    """Else the job would wait for a node that never takes it."""
    await world.node("n1", can=())
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n2", job=asking())
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.age_late()
    await world.link.send("HSET", world.cell.keys.node(NodeId("n2")), "breaker_n", 0)
    await world.end_grace()
    await world.sweep()

    two = await again(world, one, "n1", "n2")

    assert two.owner == world.holders[NodeId("n2")]


# who is refused


async def test_a_job_that_no_living_node_can_do_is_refused_by_name(world: World):
    await world.node("n1", can=())

    refused = await world.refused(job=asking())

    assert (refused.code, refused.retry_after_ms) == ("unsupported", 0)
    assert "logprobs" in refused.reason and f"model {MODEL}" in refused.reason
    assert await world.submit()


async def hash_reads(world: World, count: int) -> int:
    """What a burst of refused submits reads; each is a node's hash or a job's."""
    await world.link.send("CONFIG", "RESETSTAT")
    asked = [world.cell.submit(world.submission(job=asking())) for _ in range(count)]
    answers = await asyncio.gather(*asked)
    assert {answer.code for answer in answers if isinstance(answer, Refused)} == {"unsupported"}
    stats = (await world.link.send("INFO", "commandstats")).decode()
    return int(re.search(r"cmdstat_hmget:calls=(\d+)", stats)[1])  # type: ignore[index]


@pytest.mark.parametrize(("nodes", "first", "second"), [(200, 2 * 200, 2 * 200), (300, 2 * 300, 0)])
async def test_refused_submits_look_through_the_nodes_once_not_each(world: World, nodes: int, first: int, second: int):
    """A large fleet, where that takes milliseconds of the server's one thread, once a second."""
    await world.node("n1", can=())
    (beat_ms,) = (await world.link.send("ZRANGE", world.cell.keys.model(MODEL), 0, 0, "WITHSCORES"))[1:]
    for number in range(nodes - 1):
        await world.link.send("HSET", world.cell.keys.node(NodeId(f"x{number}")), "state", "up", "can", "-")
        await world.link.send("ZADD", world.cell.keys.model(MODEL), beat_ms, f"x{number}")
    burst = 64

    reads = [await hash_reads(world, burst) - burst for _ in range(2)]
    await world.beat("n1", can=LOGPROBS)
    await world.link.send("PEXPIRE", world.cell.keys.unable(MODEL), 1)
    await asyncio.sleep(0.01)

    assert reads == [first, second]
    assert await world.submit(job=asking())


async def test_a_plain_producer_is_told_the_same(world: World):
    await world.node("n1", can=())
    entry = (await world.link.send("XADD", world.cell.keys.jobs, "*", "job", "{}")).decode()
    await world.group(world.cell.keys.jobs, "dispatcher")

    await world.cell.admit(entry, world.submission("p", job=asking(), out="reply:r", gateway=""))

    (end,) = await world.ends(out="reply:r")
    assert (end.state, end.error_code) == ("failed", "unsupported")
    assert end.error_message == REASONS["unsupported"].format(detail="logprobs", model=MODEL, figure=0)


async def test_while_a_node_that_can_is_away_the_client_is_asked_to_come_again(world: World):
    await world.node("n1", can=())
    await world.node("n2", can=LOGPROBS)
    await fall_silent(world, "n2")

    refused = await world.refused(job=asking())

    assert refused.code == "no_node" and refused.retry_after_ms > 0
    assert refused.reason == "1 node(s) served the model m with logprobs, but none is alive"


async def test_without_any_living_node_the_answer_is_the_usual_one(world: World):
    await world.node("n1", can=())
    await fall_silent(world, "n1")

    refused = await world.refused(job=asking())

    assert (refused.code, refused.reason) == ("no_node", "1 node(s) served the model m, but none is alive")


async def test_a_job_that_is_driven_again_is_not_refused_at_submit(world: World):
    await world.node("n1", can=())

    assert await world.submit(job=asking(), redrive=True, deadline_at_ms=9_999_999_999_999)


async def test_a_waiting_job_that_no_known_node_can_do_ends_once(world: World):
    await world.node("n1", can=LOGPROBS)
    job_id = await world.submit(job=asking())
    fence = (await world.cell.job(job_id)).fence  # type: ignore[union-attr]
    early = await world.cell.end_unserved(job_id, fence)
    await world.beat("n1", can=())

    ended = await world.cell.end_unserved(job_id, fence)
    twice = await world.cell.end_unserved(job_id, fence)

    assert early == NotYours(job_id, "queued")
    assert (ended, twice) == (Ended(job_id, "failed"), Ended(job_id, "failed", earlier=True))
    (end,) = await world.ends()
    assert (end.error_code, end.error_message) == (
        "unsupported",
        f"logprobs: no node that serves the model {MODEL} can do it",
    )
    assert (await world.cell.look()).queues[0].length == 0


async def test_a_waiting_job_waits_on_for_a_node_that_is_away_or_for_any(world: World):
    await world.node("n1", can=())
    await world.node("n2", can=LOGPROBS)
    job_id, plain = await world.submit(job=asking()), await world.submit()
    await fall_silent(world, "n2")
    fence = (await world.cell.job(job_id)).fence  # type: ignore[union-attr]

    away = await world.cell.end_unserved(job_id, fence)
    await world.link.send("DEL", world.cell.keys.model(MODEL))
    nobody = await world.cell.end_unserved(job_id, fence)
    other = await world.cell.end_unserved(plain, fence)

    assert [away, nobody, other] == [NotYours(job_id, "queued"), NotYours(job_id, "queued"), NotYours(plain, "queued")]


async def leave(world: World, node: str) -> None:
    holder = world.holders[NodeId(node)]
    assert await world.publish(NodeBye(NodeId(node), int(holder.rpartition(".")[2]))) == "applied"


async def test_a_job_waits_for_the_only_node_that_can_while_that_restarts(world: World):
    """A graceful restart says bye: the node is not known as away, and comes back in a moment."""
    await world.node("n1", can=())
    await world.node("n2", can=LOGPROBS)
    job_id = await world.submit(job=asking())
    fence = (await world.cell.job(job_id)).fence  # type: ignore[union-attr]
    await leave(world, "n2")
    await world.sweep()

    left = await world.cell.end_unserved(job_id, fence)
    refused = await world.refused(job=asking())
    await world.node("n2", can=LOGPROBS)
    (assigned,) = await world.dispatch("n1", "n2")

    assert left == NotYours(job_id, "queued")
    assert refused.code == "no_node" and refused.retry_after_ms > 0
    assert refused.reason == "1 node(s) served the model m with logprobs, but none is alive"
    assert isinstance(assigned, Assigned) and assigned.node == "n2"


async def test_a_node_that_left_is_not_waited_for_when_it_comes_back_unable_or_with_another_model(world: World):
    await world.node("n1", can=())
    for name, more in (("n2", {"can": ()}), ("n3", {"can": LOGPROBS, "models": ("other",)})):
        await world.node(name, can=LOGPROBS)
        job_id = await world.submit(job=asking())
        await leave(world, name)
        await world.node(name, **more)

        ended = await world.cell.end_unserved(job_id, (await world.cell.job(job_id)).fence)  # type: ignore[union-attr]

        assert ended == Ended(job_id, "failed")


async def test_a_job_driven_again_after_a_loss_of_everything_waits_until_every_node_has_beaten(world: World):
    await world.link.send("FLUSHALL")
    await world.node("n1", can=())
    job_id = await world.submit(job=asking(), redrive=True, deadline_at_ms=9_999_999_999_999)
    fence = (await world.cell.job(job_id)).fence  # type: ignore[union-attr]

    early = await world.cell.end_unserved(job_id, fence)
    hasty = Cell(world.link, world.cell.cell, SETTINGS.changed(node_ttl_ms=100, beat_ms=30))
    await asyncio.sleep(0.15)
    late = await hasty.end_unserved(job_id, fence)

    assert (early, late) == (NotYours(job_id, "queued"), Ended(job_id, "failed"))
