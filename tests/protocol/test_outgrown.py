"""A job that outgrows a node's context goes on at a node with a larger one, and ends where there is none."""

import re
from typing import Any

import pytest

from bus.codec.entries import Assignment
from bus.codec.events import NodeBye, NodeDrain
from bus.codec.wire import Assigned, Ended, Largest, NotAssigned, NotYours, QueuedJob, Requeued
from bus.ids import JobId, NodeId
from tests.protocol.test_logprobs import asking
from tests.protocol.world import MODEL, SETTINGS, World


async def outgrow(world: World, one: Assignment, context: int) -> Requeued | Ended | NotYours | Largest:
    return await world.cell.outgrow(one.job_id, one.fence, context, "too long")


async def heads(world: World) -> list[QueuedJob]:
    return [job for queue in (await world.cell.look()).queues for job in queue.heads]


async def assigned(world: World, job_id: JobId, *nodes: str) -> Assignment:
    (answer,) = await world.dispatch(*nodes)
    assert isinstance(answer, Assigned), answer
    return next(one for one in await world.read(answer.node) if one.job_id == job_id)


async def last_beat(world: World, node: str, ago_ms: int) -> None:
    """It has been silent for so long, but is still known."""
    now_ms = (await world.cell.look()).now_ms
    await world.link.send("DEL", world.cell.keys.node_alive(NodeId(node)))
    await world.link.send("ZADD", world.cell.keys.model(MODEL), now_ms - ago_ms, node)


async def leave(world: World, node: str, ago_ms: int) -> None:
    holder = world.holders[NodeId(node)]
    await world.publish(NodeBye(NodeId(node), int(holder.rpartition(".")[2])))
    now_ms = (await world.cell.look()).now_ms
    await world.link.send("ZADD", world.cell.keys.left(MODEL), now_ms - ago_ms, node)


async def age_redrive(world: World, job_id: JobId) -> None:
    """It was driven again a TTL ago."""
    key = world.cell.keys.job(job_id)
    words = (await world.link.send("HGET", key, "spec")).decode().split(" ")
    words[4] = str(int(words[4]) - SETTINGS.node_ttl_ms)
    await world.link.send("HSET", key, "spec", " ".join(words))


async def begin(world: World, node: str, **more: Any) -> Assignment:
    """A job that has begun its answer there."""
    one = await world.start(node, **more)
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])
    return one


async def test_a_prompt_that_is_too_long_for_its_node_goes_to_a_larger_one_and_is_held_against_nobody(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await world.start("small")

    reply = await outgrow(world, one, 256)
    (head,) = await heads(world)
    vain = await world.dispatch("small")
    two = await assigned(world, one.job_id, "small", "big")

    assert reply == Requeued(one.job_id, "outgrown", 0)
    assert (head.outgrown, head.refused, head.avoid, head.begun) == (256, ("small",), ("small",), False)
    assert vain == [NotAssigned(one.job_id, "no_room")]
    assert two.owner == world.holders[NodeId("big")]
    record, small = await world.cell.job(one.job_id), await world.cell.node(NodeId("small"))
    assert record is not None and (record.crashes, record.node_errors) == (0, 0)
    assert small is not None and (small.failed, small.client_errors, small.breaker_n) == (0, 0, 0)
    assert await world.running("small") == [] and await world.pending("small") == 0


async def test_an_answer_goes_on_with_all_that_is_stored_of_it(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await begin(world, "small", stream=True)

    reply = await outgrow(world, one, 256)
    (head,) = await heads(world)
    two = await assigned(world, one.job_id, "small", "big")
    await world.finish(two, 3, b"def", new_tokens=6, reason="stop")

    assert isinstance(reply, Requeued) and head.begun
    assert (two.text_len, two.token_len) == (3, 3)
    assert [frame.text for frame in await world.frames()] == [b"abc", b"def"]
    assert [(end.state, end.text_len) for end in await world.ends()] == [("done", 6)]


@pytest.mark.parametrize("others", [{}, {"twin": 256}, {"less": 100}])
@pytest.mark.parametrize("begun", [True, False])
async def test_without_a_larger_context_nothing_is_changed(world: World, others: dict[str, int], begun: bool):
    await world.node("small", context_length=256)
    for name, context in others.items():
        await world.node(name, context_length=context)
    one = await begin(world, "small") if begun else await world.start("small")
    before = await world.dump()

    reply = await outgrow(world, one, 256)

    assert reply == Largest(one.job_id)
    assert await world.dump() == before
    await world.finish(one, one.text_len + 3 * begun, b"", reason="length")
    assert [end.reason for end in await world.ends()] == ["length"]


async def test_a_node_that_does_not_say_its_context_is_tried_with_a_prompt_only(world: World):
    """It would have to say the answer again, in words that may differ."""
    await world.node("small", context_length=256)
    await world.http_node("h1")
    prompt, answer = await world.start("small"), await begin(world, "small")

    assert isinstance(await outgrow(world, prompt, 256), Requeued)
    assert isinstance(await outgrow(world, answer, 256), Largest)


async def test_a_node_that_does_not_say_its_context_is_not_waited_for(world: World):
    """It may hold no more than the one that refused."""
    await world.node("small", context_length=256)
    await world.http_node("h1")
    one = await world.start("small")
    await last_beat(world, "h1", SETTINGS.node_ttl_ms + 1000)

    assert await outgrow(world, one, 256) == Largest(one.job_id)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_node_that_was_ordered_to_drain_is_not_waited_for_but_one_that_restarts_is(world: World, begun: bool):
    await world.node("small", context_length=256)
    holder = await world.node("big", context_length=8192)
    one = await begin(world, "small") if begun else await world.start("small")
    await world.publish(NodeDrain(NodeId("big"), int(holder.rpartition(".")[2])))

    ordered = await outgrow(world, one, 256)
    await world.cell.drain_node(NodeId("big"), holder)
    leaving = await outgrow(world, one, 256)

    assert ordered == Largest(one.job_id)
    assert isinstance(leaving, Requeued)


async def test_what_a_node_refused_that_does_not_say_is_tried_only_where_more_is_said_than_was_tried(world: World):
    """Else a hopeless prompt would be sent to each of a hundred HTTP nodes."""
    for name in ("h1", "h2"):
        await world.http_node(name, relay=f"relay.{name}")
    one = await world.start("h1")

    alone = await outgrow(world, one, 0)
    await world.node("small", context_length=256)
    first = await outgrow(world, one, 0)
    (head,) = await heads(world)
    two = await assigned(world, one.job_id, "small")
    second = await outgrow(world, two, 256)
    three = await assigned(world, one.job_id, "h2")
    last = await outgrow(world, three, 0)

    assert alone == Largest(one.job_id)
    assert isinstance(first, Requeued) and head.outgrown == 0
    assert isinstance(second, Requeued)
    assert last == Largest(one.job_id)


async def test_a_node_that_refused_once_is_not_asked_again(world: World):
    await world.node("small", context_length=256)
    await world.node("middle", context_length=512)
    one = await world.start("small")
    await outgrow(world, one, 256)
    two = await assigned(world, one.job_id, "middle")

    assert await outgrow(world, two, 300) == Largest(one.job_id)  # middle says 512 in its beats


async def test_a_node_to_avoid_is_not_passed_over_for_one_that_is_too_small(world: World):
    await world.node("small", context_length=256)
    await world.node("less", context_length=100)
    await world.node("big", context_length=8192)
    one = await world.start("big")
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.link.send("HSET", world.cell.keys.node(NodeId("big")), "breaker_n", 0)
    await world.end_grace()
    await world.age_late()
    await world.sweep()
    two = await assigned(world, one.job_id, "small")
    await outgrow(world, two, 256)

    three = await assigned(world, one.job_id, "big")

    assert three.owner == world.holders[NodeId("big")]


@pytest.mark.parametrize("left", [False, True])
async def test_an_answer_does_not_pass_a_node_to_avoid_over_for_one_that_says_no_context(world: World, left: bool):
    """Dispatchers name none of these for it, and it would wait for ever. left: it goes to any context that is said."""
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    await world.http_node("h1")
    one = await begin(world, "small")
    await outgrow(world, one, 256)
    if left:
        await last_beat(world, "big", SETTINGS.node_ttl_ms + 1000)
        assert isinstance(await world.cell.end_unserved(one.job_id, one.fence), Requeued)
        await world.beat("big", context_length=8192)
    await world.dispatch("big")
    await world.end_grace()
    await world.age_reservations("big")
    await world.sweep()
    if left:
        await last_beat(world, "small", 0)
    (head,) = await heads(world)

    two = await assigned(world, one.job_id, "big")

    assert head.begun and "big" in head.avoid
    assert two.text_len == 3


async def test_tokens_that_have_shown_no_text_are_no_beginning(world: World):
    """Half a character, or half a stop string: a node without their digest makes them again."""
    await world.node("small", context_length=256)
    await world.http_node("h1")
    one = await world.start("small")
    await world.flush(one, 0, b"", 0, [1])
    await outgrow(world, one, 256)

    (head,) = await heads(world)
    two = await assigned(world, one.job_id, "h1")

    assert (head.resume, head.begun) == ("d", False)
    assert (two.text_len, two.token_len) == (0, 0)


AWAY = ["lease", "silent", "bye"]


async def send_away(world: World, node: str, how: str, ago_ms: int) -> None:
    match how:
        case "lease":
            await world.age_lease(world.holders[NodeId(node)])
            await last_beat(world, node, ago_ms)
        case "silent":
            await last_beat(world, node, ago_ms)
        case _:
            await leave(world, node, ago_ms)


@pytest.mark.parametrize("how", AWAY)
async def test_a_prompt_waits_for_a_larger_node_that_is_away(world: World, how: str):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await world.start("small")
    await send_away(world, "big", how, 10 * SETTINGS.node_ttl_ms)

    reply = await outgrow(world, one, 256)
    vain = await world.cell.end_unserved(one.job_id, one.fence)
    meanwhile = await world.dispatch("small")
    await world.age_lease(world.holders[NodeId("big")])
    await world.node("big", context_length=8192)
    two = await assigned(world, one.job_id, "small", "big")

    assert isinstance(reply, Requeued)
    assert vain == NotYours(one.job_id, "queued")
    assert meanwhile == [NotAssigned(one.job_id, "no_room")]
    assert two.owner == world.holders[NodeId("big")]


@pytest.mark.parametrize("how", AWAY)
@pytest.mark.parametrize("recent", [True, False])
async def test_an_answer_waits_only_for_a_larger_node_that_was_there_a_moment_ago(world: World, how: str, recent: bool):
    """A restart takes seconds; after that `length` is better than silence."""
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await begin(world, "small")
    await send_away(world, "big", how, SETTINGS.node_ttl_ms // 2 if recent else SETTINGS.node_ttl_ms + 1000)

    reply = await outgrow(world, one, 256)

    assert isinstance(reply, Requeued if recent else Largest)


async def test_a_prompt_of_which_no_size_is_known_waits_for_no_node_that_is_away(world: World):
    """An HTTP node may have refused 200,000 tokens: one that left an hour ago and held 256 is not worth a deadline."""
    await world.http_node("h1")
    await world.node("tiny", context_length=256)
    one, two = await world.start("h1"), await world.start("h1")
    queued = await outgrow(world, one, 0)
    await leave(world, "tiny", SETTINGS.node_ttl_ms + 1000)

    assert isinstance(queued, Requeued)
    assert await world.cell.end_unserved(one.job_id, one.fence) == Requeued(one.job_id, "outgrown", 0)
    assert await outgrow(world, two, 0) == Largest(two.job_id)


@pytest.mark.parametrize("shown", [b"abc", b""])
async def test_a_job_that_was_driven_again_waits_until_the_nodes_that_live_have_beaten(world: World, shown: bytes):
    """The server lost everything: larger nodes become known one by one."""
    await world.node("small", context_length=256)
    one = await world.start("small", redrive=True, attempt_floor=3, shown_text=shown)

    reply = await outgrow(world, one, 256)
    early = await world.cell.end_unserved(one.job_id, one.fence)
    await age_redrive(world, one.job_id)
    late = await world.cell.end_unserved(one.job_id, one.fence)

    assert isinstance(reply, Requeued)
    assert early == NotYours(one.job_id, "queued")
    assert isinstance(late, Requeued)


async def test_a_job_that_was_driven_again_long_ago_waits_for_nobody(world: World):
    await world.node("small", context_length=256)
    one = await world.start("small", redrive=True, attempt_floor=3)
    await age_redrive(world, one.job_id)

    assert await outgrow(world, one, 256) == Largest(one.job_id)


async def test_an_answer_for_which_not_even_a_context_is_left_goes_on_as_any_whose_node_is_gone(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    await world.http_node("h1")
    one = await begin(world, "small")
    await outgrow(world, one, 256)
    await last_beat(world, "big", SETTINGS.node_ttl_ms + 1000)
    await world.cell.end_unserved(one.job_id, one.fence)

    hoping = await world.cell.end_unserved(one.job_id, one.fence)
    await last_beat(world, "small", SETTINGS.node_ttl_ms + 1000)
    forgotten = await world.cell.end_unserved(one.job_id, one.fence)
    (head,) = await heads(world)
    two = await assigned(world, one.job_id, "h1")

    assert hoping == NotYours(one.job_id, "queued")
    assert isinstance(forgotten, Requeued) and head.outgrown is None
    assert await outgrow(world, two, 0) == Largest(one.job_id)


async def test_an_answer_that_waited_in_vain_ends_at_any_node_as_it_would_have(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await begin(world, "small")
    await last_beat(world, "big", 0)
    await outgrow(world, one, 256)

    hoping = await world.cell.end_unserved(one.job_id, one.fence)
    await last_beat(world, "big", SETTINGS.node_ttl_ms + 1000)
    returned = await world.cell.end_unserved(one.job_id, one.fence)
    (head,) = await heads(world)
    two = await assigned(world, one.job_id, "small")
    last = await outgrow(world, two, 256)
    await world.finish(two, 3, b"", reason="length")

    assert hoping == NotYours(one.job_id, "queued")
    assert returned == Requeued(one.job_id, "outgrown", 0)
    assert (head.outgrown, head.begun) == (0, True), "any context that is said will do"
    assert (head.refused, head.avoid) == ((), ())
    assert two.text_len == two.token_len == 3
    assert last == Largest(one.job_id)
    assert [(end.state, end.reason, end.text_len) for end in await world.ends()] == [("done", "length", 3)]


async def test_a_prompt_whose_larger_node_was_removed_ends_at_any_node(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await world.start("small")
    await outgrow(world, one, 256)
    await world.link.send("ZREM", world.cell.keys.model(MODEL), "big")
    await world.link.send("DEL", world.cell.keys.node_alive(NodeId("big")))

    returned = await world.cell.end_unserved(one.job_id, one.fence)
    two = await assigned(world, one.job_id, "small")

    assert isinstance(returned, Requeued)
    assert await outgrow(world, two, 256) == Largest(one.job_id)


async def reads_to_end(world: World, ones: list[Assignment], context: int) -> int:
    """How many nodes' and jobs' hashes are read until each of them is told that there is no larger context."""
    await world.link.send("CONFIG", "RESETSTAT")
    for one in ones:
        assert await outgrow(world, one, context) == Largest(one.job_id)
    stats = (await world.link.send("INFO", "commandstats")).decode()
    return int(re.search(r"cmdstat_hmget:calls=(\d+)", stats)[1])  # type: ignore[index]


@pytest.mark.parametrize("begun", [True, False])
async def test_jobs_that_outgrow_a_large_fleet_look_through_it_once_not_each(world: World, begun: bool):
    """It takes milliseconds of the server's one thread. A node that comes is seen all the same, and one that leaves."""
    await world.node("small", capacity=64, context_length=256)
    ones = [await (begin(world, "small") if begun else world.start("small")) for _ in range(32)]
    (beat_ms,) = (await world.link.send("ZRANGE", world.cell.keys.model(MODEL), 0, 0, "WITHSCORES"))[1:]
    for number in range(299):
        await world.link.send("HSET", world.cell.keys.node(NodeId(f"x{number}")), "state", "up", "context_length", 256)
        await world.link.send("ZADD", world.cell.keys.model(MODEL), beat_ms, f"x{number}")

    reads = await reads_to_end(world, ones, 256)
    await world.node("big", context_length=8192)
    came = await outgrow(world, ones[0], 256)
    await leave(world, "big", 0)
    restarts = await outgrow(world, ones[1], 256)

    assert reads == 2 * len(ones) + 300 * (1 if begun else 2)  # a prompt: of all that are known, and of who says none
    assert isinstance(came, Requeued) and isinstance(restarts, Requeued)
    assert await world.link.send("GET", world.cell.keys.largest(MODEL, recent=begun)) == b"8192 0 300"


async def test_a_larger_node_that_cannot_do_what_the_job_asks_for_does_not_count(world: World):
    await world.node("small", context_length=256, can=("logprobs",))
    await world.node("big", context_length=8192, can=())
    one = await world.start("small", job=asking())

    assert await outgrow(world, one, 256) == Largest(one.job_id)


async def test_a_cancelled_or_late_job_ends_though_a_larger_node_is_there(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one, two = await world.start("small"), await world.start("small")
    await world.cell.cancel(one.job_id, "me")
    await world.age_deadline(two.job_id)

    assert await outgrow(world, one, 256) == Ended(one.job_id, "cancelled")
    assert await outgrow(world, two, 256) == Ended(two.job_id, "failed")


async def test_a_zombie_and_a_repeated_call_change_nothing(world: World):
    await world.node("small", context_length=256)
    await world.node("big", context_length=8192)
    one = await begin(world, "small")
    await outgrow(world, one, 256)
    queued = await outgrow(world, one, 256)
    two = await assigned(world, one.job_id, "big")
    before = await world.dump()

    again = await outgrow(world, one, 256)

    assert (queued, again) == (NotYours(one.job_id, "queued"), NotYours(one.job_id, "fence"))
    assert await world.dump() == before
    assert await world.running("big") == [f"{two.job_id}/{two.fence}"]
