"""requeue: the only rule that retries a job. What counts against whom, and when it is enough."""

import pytest

from bus.codec.entries import Assignment
from bus.codec.wire import Ended, NotYours, Requeued
from bus.ids import Fence, JobId, NodeId
from tests.protocol.world import World


async def again(world: World, one: Assignment, node: str = "n1") -> Assignment:
    """The job's next attempt, read by the node; hold-backs and breakers are over."""
    await world.age_late()
    await world.link.send("HSET", world.cell.keys.node(NodeId(node)), "breaker_n", 0, "breaker_until", 0)
    await world.end_grace()
    await world.sweep()
    await world.dispatch(node)
    return next(found for found in await world.read(node) if found.job_id == one.job_id)


async def test_a_requeued_job_goes_to_the_head_with_its_progress(world: World):
    await world.node(capacity=1)
    one = await world.start(stream=True)
    await world.submit()
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])

    reply = await world.cell.requeue(one.job_id, one.fence, "drain")
    two = await again(world, one)

    assert reply == Requeued(one.job_id, "drain", 0)
    assert (two.text_len, two.token_len) == (3, 3)
    assert two.fence != one.fence
    assert await world.pending() == 1


async def test_only_the_running_attempt_can_be_requeued(world: World):
    await world.node()
    one = await world.start()

    wrong = await world.cell.requeue(one.job_id, Fence("7.x"), "crash")
    unknown = await world.cell.requeue(JobId("c0-none"), one.fence, "crash")
    await world.cell.requeue(one.job_id, one.fence, "drain")
    twice = await world.cell.requeue(one.job_id, one.fence, "drain")
    two = await again(world, one)
    await world.finish(two)
    ended = await world.cell.requeue(two.job_id, two.fence, "crash")

    assert [type(reply) for reply in (wrong, unknown, twice)] == [NotYours] * 3
    assert ended == Ended(one.job_id, "done", earlier=True)
    assert len(await world.ends()) == 1


async def test_the_first_crash_is_an_ordinary_retry_the_second_runs_alone_the_third_is_a_dead_letter(world: World):
    """One poison job cannot take a fleet down, and its neighbours are not blamed."""
    await world.node()
    one = await world.start()
    first = await world.cell.requeue(one.job_id, one.fence, "crash")
    two = await again(world, one)
    second = await world.cell.requeue(two.job_id, two.fence, "crash")
    three = await again(world, two)

    third = await world.cell.requeue(three.job_id, three.fence, "crash", "exit code -11")

    assert isinstance(first, Requeued) and not first.alone
    assert isinstance(second, Requeued) and second.alone
    assert third == Ended(one.job_id, "failed")
    (end,) = await world.ends()
    assert (end.error_code, "exit code -11" in end.error_message) == ("crashed", True)
    assert [letter["entry"] for letter in await world.dead()] == [one.job_id.encode()]
    assert await world.running() == []


async def test_a_node_error_holds_the_job_back_longer_each_time_and_fails_it_at_the_fourth(world: World):
    await world.node()
    one = await world.start()
    waits = []
    for _ in range(3):
        reply = await world.cell.requeue(one.job_id, one.fence, "node_error", "502 from node")
        assert isinstance(reply, Requeued)
        waits.append(round((reply.due_ms - (await world.cell.look()).now_ms) / 1000))
        one = await again(world, one)

    last = await world.cell.requeue(one.job_id, one.fence, "node_error", "502 from node")

    assert waits == [1, 2, 4]
    assert last == Ended(one.job_id, "failed")
    (end,) = await world.ends()
    assert (end.error_code, end.error_message) == ("node_error", "502 from node")


async def test_a_node_error_opens_the_nodes_breaker_and_counts_as_its_failure(world: World):
    await world.node(capacity=3)
    one, other = await world.start(), await world.start()

    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.cell.requeue(other.job_id, other.fence, "node_error")

    view = await world.cell.node(NodeId("n1"))
    assert view is not None
    assert (view.breaker_n, view.failed) == (1, 2)  # both ran when it opened: it opens once
    assert view.breaker_until_ms > (await world.cell.look()).now_ms


@pytest.mark.parametrize("why", ["drain", "unread"])
async def test_drain_and_unread_count_nothing(world: World, why: str):
    await world.node()
    one = await world.start()
    for _ in range(6):
        reply = await world.cell.requeue(one.job_id, one.fence, why)  # type: ignore[arg-type]
        assert isinstance(reply, Requeued)
        one = await again(world, one)

    record = await world.cell.job(one.job_id)
    assert record is not None and (record.crashes, record.node_errors, record.alone) == (0, 0, False)


async def test_a_lost_relay_counts_nothing_twice_and_then_as_a_crash(world: World):
    await world.node()
    one = await world.start()
    crashes = []
    for _ in range(4):
        await world.cell.requeue(one.job_id, one.fence, "relay_lost")
        record = await world.cell.job(one.job_id)
        assert record is not None
        crashes.append(record.crashes)
        one = await again(world, one)

    assert crashes == [0, 0, 1, 2]


async def test_a_cancelled_job_ends_instead(world: World):
    await world.node()
    one = await world.start()
    await world.cell.cancel(one.job_id, "me")

    reply = await world.cell.requeue(one.job_id, one.fence, "crash")

    assert reply == Ended(one.job_id, "cancelled")
    assert [end.state for end in await world.ends()] == ["cancelled"]


async def test_a_job_past_its_deadline_ends_instead(world: World):
    await world.node()
    one = await world.start()
    await world.flush(one, 0, b"part")
    await world.age_deadline(one.job_id)

    reply = await world.cell.requeue(one.job_id, one.fence, "drain")

    assert reply == Ended(one.job_id, "failed")
    (end,) = await world.ends()
    assert (end.error_code, end.text) == ("deadline_exceeded", b"part")


async def test_the_reasons_are_in_the_events(world: World):
    await world.node()
    one = await world.start()

    await world.cell.requeue(one.job_id, one.fence, "drain", "rolling restart")

    entries = await world.link.send("XREVRANGE", world.cell.keys.events, "+", "-", "COUNT", 1)
    assert entries[0][1] == [
        *(b"type", b"requeued", b"subject", one.job_id.encode(), b"why", b"drain"),
        *(b"detail", b"n1: rolling restart"),
    ]


async def test_a_dead_process_fails_once_in_its_nodes_record(world: World):
    await world.node(capacity=9)
    ones = [await world.start() for _ in range(5)]
    for one in ones:
        await world.flush(one, 0, b"x")

    replies = await world.cell.down(NodeId("n1"), ones[0].owner)

    view = await world.cell.node(NodeId("n1"))
    assert [reply.why for reply in replies if isinstance(reply, Requeued)] == ["crash"] * 5
    assert view is not None and (view.failed, view.leased, view.running) == (1, False, 0)


async def test_down_counts_nothing_for_a_job_that_was_never_read(world: World):
    await world.node()
    await world.submit()
    await world.dispatch()

    (reply,) = await world.cell.down(NodeId("n1"), world.holders[NodeId("n1")])

    assert isinstance(reply, Requeued) and reply.why == "unread"


async def test_down_of_an_earlier_holder_touches_nothing_of_the_next(world: World):
    old = await world.node()
    await world.age_lease(old)
    await world.node()
    one = await world.start()

    replies = await world.cell.down(NodeId("n1"), old)

    assert replies == []
    assert await world.state(one.job_id) == "running"


async def test_down_of_a_relay_hands_back_the_jobs_of_all_its_nodes(world: World):
    relay = await world.http_node("h1")
    await world.http_node("h2")
    ones = [await world.start("h1"), await world.start("h2")]
    for one, node in zip(ones, ("h1", "h2"), strict=True):
        await world.cell.renew(NodeId(node), relay, [(one.job_id, one.fence)])

    replies = await world.cell.down(None, relay)

    assert sorted(reply.why for reply in replies if isinstance(reply, Requeued)) == ["relay_lost", "relay_lost"]
