"""A job that its node cannot do after all: it goes to another one, waits for it, or ends."""

import pytest

from bus.codec.wire import Assigned, Ended, NotAssigned, NotYours, Requeued
from bus.ids import NodeId
from tests.protocol.test_capabilities import LOGPROBS, again, fall_silent, forget_refusals, leave, refuse, view
from tests.protocol.test_logprobs import asking
from tests.protocol.world import World


async def test_a_refused_job_goes_to_another_node_at_once_and_the_next_one_does_not_try(world: World):
    await world.node("n1")
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await world.flush(one, 0, b"abc")

    reply = await refuse(world, one)
    seen = await view(world)
    two = await again(world, one, "n1", "n2")
    await world.submit("next", job=asking())
    (after,) = await world.dispatch("n1", "n2")

    assert reply == Requeued(one.job_id, "unable", 0)
    assert (seen.cannot, seen.breaker_n, seen.failed) == (LOGPROBS, 0, 0)  # no fault of the node
    assert two.owner == world.holders[NodeId("n2")] and two.text_len == 3
    assert isinstance(after, Assigned) and after.node == "n2"
    record = await world.cell.job(one.job_id)
    assert record is not None and (record.crashes, record.node_errors) == (0, 0)


async def test_the_last_refusal_is_the_jobs_one_end_and_the_next_job_is_refused_at_once(world: World):
    await world.node("n1")
    await world.node("n2")
    one = await world.start("n1", job=asking())

    first = await refuse(world, one)
    two = await again(world, one, "n1", "n2")
    second = await refuse(world, two)
    zombie = await refuse(world, one)
    refused = await world.refused(job=asking())

    assert isinstance(first, Requeued)
    assert second == Ended(one.job_id, "failed")
    assert zombie == NotYours(one.job_id, "fence")
    (end,) = await world.ends()
    assert end.error_code == "unsupported"
    assert "logprobs" in end.error_message and "n2: it has none" in end.error_message
    assert refused.code == "unsupported"
    assert await world.running("n1") == await world.running("n2") == []


async def test_a_job_that_was_driven_again_is_not_refused_before_the_nodes_that_live_have_beaten(world: World):
    await world.node("n1")
    one = await world.start("n1", job=asking(), redrive=True, attempt_floor=3)

    assert await refuse(world, one) == Requeued(one.job_id, "unable", 0)


async def test_a_refusal_of_one_request_only_is_not_remembered_but_ends_after_each_node_was_asked(world: World):
    await world.node("n1", can=LOGPROBS)
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n1", job=asking())

    first = await refuse(world, one, lacks=False)
    two = await again(world, one, "n1", "n2")
    second = await refuse(world, two, lacks=False)

    assert isinstance(first, Requeued) and two.owner == world.holders[NodeId("n2")]
    assert second == Ended(one.job_id, "failed")
    assert (await view(world)).cannot == ()
    assert await world.submit(job=asking())


async def test_a_node_avoided_for_an_error_still_gets_the_job_when_the_other_cannot(world: World):
    await world.node("n1", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.age_late()
    await world.node("n2")
    await world.end_grace()
    await world.sweep()
    two = await again(world, one, "n1", "n2")
    await world.link.send("HSET", world.cell.keys.node(NodeId("n1")), "breaker_n", 0)

    reply = await refuse(world, two)
    three = await again(world, one, "n1", "n2")

    assert isinstance(reply, Requeued)
    assert three.owner == world.holders[NodeId("n1")]


async def test_a_node_avoided_for_an_error_still_gets_the_job_when_the_other_refuses_this_job_only(world: World):
    await world.node("n1", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.age_late()
    await world.node("n2", can=LOGPROBS)
    await world.end_grace()
    await world.sweep()
    two = await again(world, one, "n2")
    await world.link.send("HSET", world.cell.keys.node(NodeId("n1")), "breaker_n", 0)

    reply = await refuse(world, two, lacks=False)
    (head,) = [job for queue in (await world.cell.look()).queues for job in queue.heads]
    three = await again(world, one, "n2", "n1")
    last = await refuse(world, three, lacks=False)

    assert isinstance(reply, Requeued)
    assert (head.avoid, head.refused) == (("n1", "n2"), ("n2",))
    assert three.owner == world.holders[NodeId("n1")]  # never again to n2, though every node is avoided
    assert last == Ended(one.job_id, "failed")
    assert [end.error_code for end in await world.ends()] == ["unsupported"]


@pytest.mark.parametrize("how", ["silent", "lease", "bye"])
@pytest.mark.parametrize("lacks", [True, False])
async def test_while_the_only_node_that_can_is_away_a_refused_job_waits_for_it(world: World, how: str, lacks: bool):
    """In mid-stream, too; who refused does not get it meanwhile."""
    await world.node("n1")
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await world.flush(one, 0, b"abc")
    match how:
        case "silent":
            await fall_silent(world, "n2")
        case "lease":
            await world.age_lease(world.holders[NodeId("n2")])
        case _:
            await leave(world, "n2")

    reply = await refuse(world, one, lacks)
    await forget_refusals(world, "n1")
    meanwhile = await world.dispatch("n1")
    vain = await world.cell.end_unserved(one.job_id, one.fence)
    await world.age_lease(world.holders[NodeId("n2")])
    await world.node("n2", can=LOGPROBS)
    two = await again(world, one, "n1", "n2")

    assert reply == Requeued(one.job_id, "unable", 0)
    assert meanwhile == [NotAssigned(one.job_id, "no_room", LOGPROBS)]
    assert vain == NotYours(one.job_id, "queued")
    assert two.owner == world.holders[NodeId("n2")] and two.text_len == 3
    assert await world.ends() == []


async def test_a_refused_job_that_waits_ends_when_the_node_it_waits_for_cannot(world: World):
    await world.node("n1", can=LOGPROBS)
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await fall_silent(world, "n2")
    await refuse(world, one, lacks=False)
    await world.beat("n2", can=())

    ended = await world.cell.end_unserved(one.job_id, one.fence)

    assert ended == Ended(one.job_id, "failed")
    assert [end.error_code for end in await world.ends()] == ["unsupported"]


async def test_a_refusal_is_forgotten_after_a_while_at_a_new_process_and_at_a_new_registration(world: World):
    await world.node("n1")
    one = await world.start("n1", job=asking())
    await refuse(world, one)
    marked = (await view(world)).cannot
    await forget_refusals(world, "n1")
    lapsed = (await view(world)).cannot
    two = await world.start("n1", job=asking())
    await refuse(world, two)
    await world.age_lease(world.holders[NodeId("n1")])
    await world.node("n1")
    restarted = (await view(world)).cannot

    await world.http_node("h1")
    await world.link.send("HSET", world.cell.keys.node(NodeId("h1")), "cannot", "logprobs:9999999999999")
    await world.http_node("h1")

    assert (marked, lapsed, restarted) == (LOGPROBS, (), ())
    assert (await view(world, "h1")).cannot == ()


async def test_a_cancelled_job_ends_as_cancelled_though_its_node_refuses(world: World):
    await world.node("n1")
    one = await world.start("n1", job=asking())
    await world.cell.cancel(one.job_id, "me")

    assert await refuse(world, one) == Ended(one.job_id, "cancelled")
    assert [end.state for end in await world.ends()] == ["cancelled"]


async def test_a_refused_job_that_comes_back_says_in_its_queue_what_it_asks_for(world: World):
    await world.node("n1")
    await world.node("n2", can=LOGPROBS)
    one = await world.start("n1", job=asking())
    await refuse(world, one)

    heads = [job for queue in (await world.cell.look()).queues for job in queue.heads]

    assert [(job.job_id, job.needs, job.avoid) for job in heads] == [(one.job_id, LOGPROBS, ("n1",))]
