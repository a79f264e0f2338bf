"""flush and finish: durable text and tokens, no holes, one terminal, zombies change nothing."""

import msgspec
import pytest

from bus.codec.entries import End
from bus.codec.wire import Finished, FinishPiece, FlushPiece, Gap, Moved, Stop, Stored, Superseded, pack_tokens
from bus.ids import Fence, GatewayId, Holder, JobId, NodeId
from tests.protocol.world import World


async def test_text_and_tokens_are_stored_and_sent(world: World):
    await world.node()
    one = await world.start(stream=True)

    first = await world.flush(one, 0, "Grüß".encode(), 0, [1, 2])
    second = await world.flush(one, 6, b" dich", 2, [3])

    assert (first, second) == (Stored(6, 2), Stored(11, 3))
    assert await world.cell.text(one.job_id, one.fence) == "Grüß dich".encode()
    assert await world.cell.tokens(one.job_id, one.fence) == (1, 2, 3)
    assert [(f.offset, f.text, f.count) for f in await world.frames()] == [(0, "Grüß".encode(), 2), (6, b" dich", 1)]


async def test_only_a_job_that_asked_for_a_stream_gets_frames(world: World):
    await world.node()
    one = await world.start()

    await world.flush(one, 0, b"abc", 0, [1])

    assert await world.frames() == []


async def test_repeats_are_dropped_from_text_and_tokens_separately(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2])

    answers = [
        await world.flush(one, 0, b"abc", 0, [1, 2]),
        await world.flush(one, 1, b"bcd", 0, [1, 2]),
        await world.flush(one, 4, b"", 1, [2, 3]),
    ]

    assert answers == [Stored(3, 2), Stored(4, 2), Stored(4, 3)]
    assert b"".join(frame.text for frame in await world.frames()) == b"abcd"
    assert await world.cell.tokens(one.job_id, one.fence) == (1, 2, 3)


@pytest.mark.parametrize(("text_at", "token_at"), [(4, 2), (3, 3), (9, 9)])
async def test_an_offset_beyond_what_is_stored_answers_both_lengths_and_stores_nothing(
    world: World, text_at: int, token_at: int
):
    """No holes, and text never ahead of its tokens: the worker sends again from there."""
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2])

    answer = await world.flush(one, text_at, b"x", token_at, [7])

    assert answer == Gap(3, 2)
    assert await world.cell.text(one.job_id, one.fence) == b"abc"
    assert await world.cell.tokens(one.job_id, one.fence) == (1, 2)


async def test_a_node_without_a_digest_stores_text_only(world: World):
    await world.node(resume="")
    one = await world.start(stream=True)

    answer = await world.flush(one, 0, b"abc", 40, [1, 2])

    assert answer == Stored(3, 0)


async def test_a_zombie_is_told_to_stop_and_changes_nothing(world: World):
    await world.node("a")
    await world.node("b")
    zombie = await world.start("a")
    await world.cell.requeue(zombie.job_id, zombie.fence, "drain")
    queued = [await world.flush(zombie, 0, b"z"), await world.finish(zombie)]
    await world.dispatch("b")
    (one,) = await world.read("b")

    replies = [await world.flush(zombie, 0, b"z"), await world.finish(zombie)]
    await world.finish(one, 0, b"real")
    late = [await world.flush(zombie, 0, b"z"), await world.finish(zombie, 0, b"fake")]

    assert queued == [Stop("queued"), Stop("queued")]
    assert replies == [Stop("fence"), Stop("fence")]
    assert late == [Stop("done"), Stop("fence")]
    assert [end.text for end in await world.ends()] == [b"real"]


async def test_an_unknown_job_stops_the_sequence(world: World):
    await world.node()
    one = await world.start()
    await world.link.send("DEL", world.cell.keys.job(one.job_id))

    assert await world.flush(one, 0, b"z") == Stop("unknown")
    assert await world.finish(one) == Stop("unknown")


async def test_anyone_but_the_owner_is_superseded(world: World):
    await world.node()
    one = await world.start()
    await world.age_lease(one.owner)
    await world.cell.own(NodeId("n1"), "n1")

    with pytest.raises(Superseded):
        await world.flush(one, 0, b"z")
    with pytest.raises(Superseded):
        await world.finish(one)
    with pytest.raises(Superseded):
        await world.cell.renew(NodeId("n1"), one.owner, [])
    assert (await world.state(one.job_id), await world.ends()) == ("queued", [])


async def test_without_a_node_hash_the_caller_becomes_owner(world: World):
    """After a FLUSHALL the worker goes on; its next beat brings the rest back."""
    holder = await world.node()
    await world.link.send("FLUSHALL")

    await world.cell.renew(NodeId("n1"), holder, [])

    assert await world.link.send("HGET", world.cell.keys.node(NodeId("n1")), "owner") == holder.encode()
    assert await world.beat("n1") == "applied"
    view = await world.cell.node(NodeId("n1"))
    assert view is not None and view.usable(0)


async def test_a_flush_marks_the_job_started_and_extends_its_reservation(world: World):
    await world.node()
    one = await world.start()
    await world.age_reservations()

    await world.flush(one, 0, b"z")

    await world.end_grace()
    assert (await world.sweep()).requeued == ()
    record = await world.cell.job(one.job_id)
    assert record is not None and record.started_ms > 0


async def test_finish_frees_the_slot_and_appends_the_one_terminal(world: World):
    await world.node()
    one = await world.start(address="me", key_id="k", quota_max=1)

    answer = await world.finish(one, 0, b"hello", prompt_tokens=3, new_tokens=2)

    assert answer == Finished("done")
    (end,) = await world.ends()
    assert (end.state, end.reason, end.text, end.text_len) == ("done", "stop", b"hello", 5)
    assert (end.prompt_tokens, end.new_tokens, end.node, end.fence) == (3, 2, "n1", one.fence)
    assert (await world.running(), await world.pending()) == ([], 0)
    keys, send = world.cell.keys, world.link.send
    assert await send("ZCARD", keys.deadlines) == await send("ZCARD", keys.quota("k")) == 0
    assert await send("SCARD", keys.gateway_jobs(GatewayId("g1"))) == 0
    assert await send("HMGET", keys.usage("me"), "jobs", "prompt_tokens", "new_tokens") == [b"1", b"3", b"2"]
    assert not await send("EXISTS", keys.tokens(one.job_id, one.fence))
    record = await world.cell.job(one.job_id)
    assert record is not None and (record.state, record.text_len, record.reason) == ("done", 5, "stop")
    assert (record.prompt_tokens, record.new_tokens, record.node) == (3, 2, "n1")
    assert await world.cell.text(one.job_id, one.fence) == b"hello"


async def test_the_terminal_of_a_stream_carries_no_text_but_the_last_frame_does(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"ab", 0, [1])

    await world.finish(one, 2, b"cd")

    out = await world.out()
    assert b"".join(frame.text for frame in await world.frames()) == b"abcd"
    assert isinstance(out[-1], End) and (out[-1].text, out[-1].text_len) == (b"", 4)


async def test_finish_waits_for_the_text_that_is_missing(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"ab", 0, [1])

    gap = await world.finish(one, 4, b"ef")
    answer = await world.finish(one, 2, b"cdef")

    assert gap == Gap(2, 1)
    assert answer == Finished("done")
    assert await world.cell.text(one.job_id, one.fence) == b"abcdef"


async def test_a_repeated_finish_gets_the_same_answer_and_no_second_terminal(world: World):
    await world.node()
    one = await world.start(address="me")

    answers = [await world.finish(one, 0, b"x"), await world.finish(one, 0, b"x")]

    assert answers == [Finished("done"), Finished("done")]
    assert len(await world.ends()) == 1
    assert await world.link.send("HGET", world.cell.keys.usage("me"), "jobs") == b"1"


async def test_many_jobs_end_in_one_call_each_with_its_own_answer(world: World):
    await world.node(capacity=9)
    ones = [await world.start() for _ in range(4)]
    await world.cell.cancel(ones[1].job_id, "me")
    pieces = [FinishPiece(one.job_id, one.fence, one.route, 0, b"x", "stop") for one in ones]
    pieces[2] = msgspec.structs.replace(pieces[2], fence=Fence("9.zz"))
    pieces.append(pieces[0])

    answers = await world.cell.finish(ones[0].owner, NodeId("n1"), pieces)

    assert answers == [Finished("done"), Finished("cancelled"), Stop("fence"), Finished("done"), Finished("done")]
    assert len(await world.ends()) == 3
    assert await world.running() == [f"{ones[2].job_id}/{ones[2].fence}"]


async def test_a_long_answer_is_read_from_its_own_key(world: World):
    await world.node()
    one = await world.start()

    await world.finish(one, 0, b"x" * 300_000)

    (end,) = await world.ends()
    assert (end.text, end.text_len) == (b"", 300_000)
    assert len(await world.cell.text(one.job_id, one.fence, 10)) == 299_990


async def test_frames_of_a_stream_that_moved_go_to_the_new_gateway(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"ab")
    await world.cell.lease("g2")
    await world.cell.attach(one.job_id, GatewayId("g2"), "gateway:g2")

    moved = await world.flush(one, 2, b"cd")
    assert isinstance(moved, Moved)
    again = await world.finish(msgspec.structs.replace(one, route=moved.route), 2, b"cd")

    assert again == Finished("done")
    assert [frame.text for frame in await world.frames("gateway:g2")] == [b"cd"]
    assert len(await world.ends(out="gateway:g2")) == 1
    assert await world.ends() == []


async def test_client_errors_never_count_against_the_node(world: World):
    await world.node(capacity=5)
    bad_request = await world.start()
    fine = await world.start()
    broken = await world.start()

    await world.finish(bad_request, reason="error", error_code="context_length_exceeded", fault="client")
    await world.finish(fine)
    before = await world.cell.node(NodeId("n1"))
    await world.finish(broken, reason="error", error_code="oops", fault="node")
    after = await world.cell.node(NodeId("n1"))

    assert before is not None and after is not None
    assert (before.ok, before.failed, before.client_errors, before.failure) == (1, 0, 1, 0)
    assert (after.ok, after.failed) == (1, 1)
    assert after.failure == pytest.approx(0.1)
    assert [end.error_code for end in await world.ends(bad_request.job_id)] == ["context_length_exceeded"]


async def test_finish_wakes_the_dispatchers_only_if_jobs_wait(world: World):
    await world.node(capacity=1)
    one = await world.start()
    waiting = await world.submit()
    before = await world.link.send("XLEN", world.cell.keys.wake)
    await world.finish(one)
    between = await world.link.send("XLEN", world.cell.keys.wake)
    await world.dispatch()
    (two,) = await world.read("n1")
    await world.finish(two)

    assert two.job_id == waiting
    assert (between - before, await world.link.send("XLEN", world.cell.keys.wake) - between) == (1, 0)


async def test_a_foreign_reply_key_hurts_nobody(world: World):
    """A plain producer may name any reply stream, and put anything there while its job runs."""
    await world.node()
    mine = await world.start(out="reply:mine", gateway="", stream=True)
    await world.link.send("DEL", world.cell.keys.reply("mine"))
    await world.link.send("SET", world.cell.keys.reply("mine"), "foreign")

    answers = [await world.flush(mine, 0, b"a"), await world.finish(mine, 1, b"b")]

    assert answers == [Stored(1, 0), Finished("done")]
    assert await world.running() == []


async def test_one_flush_serves_many_sequences(world: World):
    await world.node(capacity=9)
    ones = [await world.start(stream=True) for _ in range(3)]
    pieces = [FlushPiece(one.job_id, one.fence, one.route, 0, b"ab", 0, pack_tokens([1])) for one in ones]
    pieces[1] = msgspec.structs.replace(pieces[1], text_offset=5)
    pieces.append(msgspec.structs.replace(pieces[0], job_id=JobId("c0-none")))

    answers = await world.cell.flush(Holder(ones[0].owner), NodeId("n1"), pieces)

    assert answers == [Stored(2, 1), Gap(0, 0), Stored(2, 1), Stop("unknown")]
