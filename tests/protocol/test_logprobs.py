"""Log probabilities beside text and tokens: the same calls and fences, no holes; others have no field more."""

import pytest
from msgspec.structs import replace

from bus.codec.entries import Frame
from bus.codec.logprobs import Candidate, TokenLogprobs, encode_record
from bus.codec.wire import FinishPiece, FlushPiece, Gap, Stored, pack_tokens
from bus.ids import Fence, JobId
from tests.protocol.world import World, chat, node_of

ONE, TWO, THREE = (encode_record(TokenLogprobs(at, Candidate(b"abc", -at - 0.5))) for at in (0, 3, 6))
SIZE = len(ONE)


def asking(*, stream: bool = True):
    return replace(chat(stream=stream), logprobs=2)


async def flush(world: World, one, text: bytes, offset: int, log: bytes, log_offset: int, tokens: int = 1):
    ids = pack_tokens([7] * tokens)
    piece = FlushPiece(one.job_id, one.fence, one.route, offset, text, offset // 3, ids, log_offset, log)
    return (await world.cell.flush(one.owner, node_of(one, world), [piece]))[0]


async def finish(world: World, one, text: bytes, offset: int, log: bytes, log_offset: int):
    piece = FinishPiece(
        one.job_id, one.fence, one.route, offset, text, "stop", logprobs_offset=log_offset, logprobs=log
    )
    return (await world.cell.finish(one.owner, node_of(one, world), [piece]))[0]


async def stored(world: World, job_id: JobId, fence: Fence) -> bytes:
    return await world.cell.logprobs(job_id, fence)


async def test_they_are_stored_and_sent_with_the_text(world: World):
    await world.node()
    one = await world.start(job=asking())
    assert one.logprobs

    await flush(world, one, b"abc", 0, ONE, 0)
    await finish(world, one, b"abc", 3, TWO, SIZE)

    first, last = await world.frames()
    assert (first.text, first.logprobs_at, first.logprobs) == (b"abc", 0, ONE)
    assert (last.text, last.logprobs_at, last.logprobs) == (b"abc", SIZE, TWO)
    [end] = await world.ends()
    assert end.logprobs_len == 2 * SIZE
    assert await stored(world, one.job_id, one.fence) == ONE + TWO


async def test_a_token_without_text_yet_sends_its_record(world: World):
    """Half a character, or what may become a stop string: so that the next frame leaves no hole."""
    await world.node()
    one = await world.start(job=asking())

    await flush(world, one, b"", 0, ONE, 0)
    await flush(world, one, b"", 0, ONE, 0)

    assert [(f.text, f.logprobs) for f in await world.frames()] == [(b"", ONE)]


async def test_a_whole_answer_carries_all_of_them(world: World):
    await world.node()
    one = await world.start(job=asking(stream=False))

    await flush(world, one, b"abc", 0, ONE, 0)
    await finish(world, one, b"abc", 3, TWO, SIZE)

    [end] = await world.ends()
    assert (end.text, end.logprobs, end.logprobs_len) == (b"abcabc", ONE + TWO, 2 * SIZE)
    assert await world.frames() == []


async def test_repeats_are_dropped_and_a_hole_is_told(world: World):
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"abc", 0, ONE, 0)

    again = await flush(world, one, b"abcabc", 0, ONE + TWO, 0, tokens=2)
    ahead = await flush(world, one, b"abc", 6, THREE, 3 * SIZE)
    ended = await finish(world, one, b"abc", 6, THREE, 3 * SIZE)

    assert again == Stored(6, 2)
    assert ahead == ended == Gap(6, 2, 2 * SIZE)
    assert await stored(world, one.job_id, one.fence) == ONE + TWO


async def test_the_next_attempt_goes_on_in_the_same_log(world: World):
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"abc", 0, ONE, 0)
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("n1")
    [two] = await world.read("n1")

    assert await world.cell.logprobs_len(two.job_id, two.fence) == SIZE
    assert await flush(world, two, b"abc", 3, TWO, SIZE) == Stored(6, 2)
    assert await stored(world, two.job_id, two.fence) == ONE + TWO


async def test_an_attempt_without_text_leaves_none_to_the_next(world: World):
    """That begins anew, perhaps with other tokens."""
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"", 0, ONE, 0)
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("n1")
    [two] = await world.read("n1")

    assert await stored(world, two.job_id, two.fence) == b""


async def test_a_job_that_does_not_ask_has_no_field_and_no_key_more(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"abc", 0, [1])
    await world.finish(one, 3, b"abc")

    entries = await world.link.send("XRANGE", world.cell.keys.out(one.route.out), "-", "+")
    names = {name for _, pairs in entries for name in pairs[::2]}
    assert names and not any(b"logprobs" in name for name in names)
    assert await world.link.send("KEYS", "*logprobs*") == []
    assert all(frame.logprobs is None for frame in await world.out() if isinstance(frame, Frame))


async def test_beside_jobs_that_do_not_ask_each_gets_its_own(world: World):
    await world.node(capacity=3)
    works = [await world.start(job=job) for job in (chat(stream=True), asking(), chat(stream=True))]
    pieces = [
        FlushPiece(one.job_id, one.fence, one.route, 0, b"abc", 0, b"", 0, ONE if one.logprobs else None)
        for one in works
    ]

    answers = await world.cell.flush(works[0].owner, node_of(works[0], world), pieces)

    assert answers == [Stored(3, 0)] * 3
    assert {f.job_id: f.logprobs for f in await world.frames()} == {
        works[0].job_id: None,
        works[1].job_id: ONE,
        works[2].job_id: None,
    }


async def test_they_expire_with_the_text(world: World):
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"abc", 0, ONE, 0)
    running = await world.link.send("PTTL", world.cell.keys.logprobs(one.job_id, one.fence))
    await finish(world, one, b"", 3, b"", SIZE)
    ended = await world.link.send("PTTL", world.cell.keys.logprobs(one.job_id, one.fence))

    assert running > world.cell.settings.job_keep_ms
    assert 0 < ended <= world.cell.settings.result_ttl_ms


@pytest.mark.parametrize("why", ["cancel", "crashes"])
async def test_they_expire_with_the_text_whoever_ends_the_job(world: World, why: str):
    """They may have many times the bytes of the text."""
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"abc", 0, ONE, 0)
    if why == "cancel":
        await world.cell.requeue(one.job_id, one.fence, "drain")
        await world.cell.cancel(one.job_id, "test")
    else:
        await world.cell.cancel(one.job_id, "test")
        await world.cell.requeue(one.job_id, one.fence, "crash")

    record = await world.cell.job(one.job_id)
    assert record is not None and record.state == "cancelled"
    keys = world.cell.keys
    text, log = [
        await world.link.send("PTTL", key)
        for key in (keys.text(one.job_id, one.fence), keys.logprobs(one.job_id, one.fence))
    ]
    assert 0 < text <= world.cell.settings.result_ttl_ms
    assert 0 < log <= world.cell.settings.result_ttl_ms


async def test_those_of_a_dead_attempt_without_text_do_not_stay(world: World):
    await world.node()
    one = await world.start(job=asking())
    await flush(world, one, b"", 0, ONE, 0)
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("n1")

    assert 0 < await world.link.send("PTTL", world.cell.keys.logprobs(one.job_id, one.fence)) <= 60_000


async def test_those_of_a_job_that_is_driven_again_stay_as_long_as_its_text(world: World):
    now, later = await world.cell._now(), 500_000

    await world.cell.keep_logprobs(JobId("c0-again"), Fence("1.r"), ONE, now + later)

    left = await world.link.send("PTTL", world.cell.keys.logprobs(JobId("c0-again"), Fence("1.r")))
    assert world.cell.settings.job_keep_ms + later - 10_000 < left <= world.cell.settings.job_keep_ms + later
