"""Many who wait for one job: each hears the whole of it and its end, whoever attaches, leaves or takes over when."""

import asyncio

import pytest

from bus.calls.caller import Caller, CallOptions, UnknownJob
from bus.calls.handle import Detached, Finished, JobHandle
from bus.codec.entries import End, Frame, parse_out
from bus.codec.wire import Accepted, Submission
from bus.ids import JobId
from bus.link import ServerAddress
from bus.link.reader import to_entry
from tests.caller.stage import SETTINGS, Stage, chat, next_text, state_is, text_of, text_of_rest
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer

KEEP = CallOptions(policy="keep")
SAME = CallOptions(policy="keep", tenant="t", idem_key="k", body_digest="d")


async def result_of(handle: JobHandle) -> tuple[str, str]:
    text, ended = await asyncio.wait_for(handle.result(), 10)
    return text.decode(), ended.state


async def test_all_who_attach_to_an_unknown_job_at_once_hear_that_it_is_unknown(caller: Caller) -> None:
    asked = [caller.attach("c0-nothing") for _ in range(3)]

    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)

    assert [type(answer) for answer in answers] == [UnknownJob] * 3
    assert caller.waiting == 0


async def test_one_who_attaches_goes_on_when_another_leaves_before_the_answer(
    caller: Caller, other: Caller, stage: Stage, server: ValkeyServer
) -> None:
    first = await other.submit(chat(), KEEP)
    work = await stage.give(first.job_id)
    await stage.say(work, 0, "Hel")
    server.pause()
    leaving = asyncio.create_task(caller.attach(first.job_id))
    await asyncio.sleep(0.05)
    staying = asyncio.create_task(caller.attach(first.job_id))
    await asyncio.sleep(0.05)

    leaving.cancel()
    await asyncio.sleep(0.05)
    server.resume()
    handle = await asyncio.wait_for(staying, 5)
    await stage.say(work, 3, "lo")
    await stage.end(work, 5)

    text, end = await text_of(handle)
    assert text == "Hello"
    assert isinstance(end, Finished)


async def test_one_who_left_before_his_attach_was_answered_leaves_nothing_behind(
    caller: Caller, other: Caller, stage: Stage, server: ValkeyServer
) -> None:
    first = await other.submit(chat(), KEEP)
    server.pause()
    leaving = asyncio.create_task(caller.attach(first.job_id))
    await asyncio.sleep(0.05)

    leaving.cancel()
    await asyncio.sleep(0.05)
    server.resume()

    await wait_until(lambda: caller.waiting == 0, timeout_s=5)
    assert await state_is(stage, first, "queued")


async def test_a_follower_and_one_who_attaches_in_the_same_process_both_hear_the_end(
    caller: Caller, other: Caller, stage: Stage
) -> None:
    first = await other.submit(chat(stream=False), SAME)
    work = await stage.give(first.job_id)
    follower = await caller.submit(chat(stream=False), SAME)

    attached = await caller.attach(first.job_id)
    await stage.say(work, 0, "Hel")
    assert await next_text(attached) == "Hel"
    await stage.end(work, 3, "lo")

    assert (await text_of_rest(attached))[0] == "lo"
    assert await result_of(follower) == ("Hello", "done")
    assert await result_of(first) == ("Hello", "done")


async def test_a_stream_may_come_back_to_the_process_it_was_taken_from(
    caller: Caller, other: Caller, stage: Stage
) -> None:
    first = await caller.submit(chat(), KEEP)
    work = await stage.give(first.job_id)
    await stage.say(work, 0, "abc")
    assert await next_text(first) == "abc"
    second = await other.attach(first.job_id, 3)
    assert isinstance(await first.next(5), Detached)

    third = await caller.attach(first.job_id, 3)
    await stage.say(work, 3, "def")
    await stage.end(work, 6)

    assert (await text_of_rest(third))[0] == "def"
    assert isinstance(await second.next(5), Detached)


async def test_a_stream_can_be_had_of_a_job_that_the_same_process_waits_for_as_a_whole(
    caller: Caller, stage: Stage
) -> None:
    whole = await caller.submit(chat(stream=False), KEEP)
    work = await stage.give(whole.job_id)

    stream = await caller.attach(whole.job_id)
    await stage.say(work, 0, "Hel")
    assert await next_text(stream) == "Hel"
    await stage.end(work, 3, "lo")

    assert (await text_of_rest(stream))[0] == "lo"
    assert await result_of(whole) == ("Hello", "done")


async def test_a_job_to_be_kept_is_kept_also_when_one_who_attached_leaves(
    caller: Caller, other: Caller, stage: Stage
) -> None:
    first = await caller.submit(chat(), KEEP)
    first.close()
    attached = await other.attach(first.job_id)

    attached.close()
    await wait_until(lambda: other.waiting == 0, timeout_s=5)

    assert await state_is(stage, first, "queued")


async def test_a_job_that_may_be_cancelled_is_cancelled_when_one_who_attached_leaves(
    caller: Caller, other: Caller, stage: Stage
) -> None:
    first = await caller.submit(chat())
    attached = await other.attach(first.job_id)
    assert isinstance(await first.next(5), Detached)
    first.close()

    attached.close()

    await wait_until(lambda: state_is(stage, first, "cancelled"), timeout_s=5)


async def test_an_attached_job_lives_until_its_own_deadline_not_until_ours(
    caller: Caller, address: ServerAddress, stage: Stage
) -> None:
    first = await caller.submit(chat(), CallOptions(policy="keep", deadline_in_ms=60_000))
    short = SETTINGS.changed(job_deadline_ms=300, lease_ms=600, renew_ms=150, self_fence_ms=400)

    async with Caller(address, short, name="short") as other:
        attached = await other.attach(first.job_id)
        assert await attached.next(3.5) is None

    assert await state_is(stage, first, "queued")


async def test_an_answer_older_than_a_marker_that_was_heard_changes_nothing(caller: Caller, stage: Stage) -> None:
    """The state of the first attempt, read before the second began and told after it: its frames would be dropped."""
    handle = await caller.submit(chat())
    first = await stage.give(handle.job_id)
    await stage.say(first, 0, "abc")
    assert await next_text(handle) == "abc"
    call = caller._calls[handle.job_id]
    markers, old = call.following.markers, await stage.cell.job(handle.job_id)
    assert old is not None
    await stage.crash(first)
    second = await stage.give(handle.job_id)
    await stage.say(second, 3, "def")
    assert await next_text(handle) == "def"

    await caller._watch.take_record(call, stage.cell, old, markers)

    assert call.following.fence == second.fence


async def test_a_plain_producers_job_is_followed_by_its_stored_text_and_stays_his(caller: Caller, stage: Stage) -> None:
    job_id = await submit_plain(stage)
    work = await stage.give(job_id)
    await stage.say(work, 0, "Hel")

    attached = await caller.attach(job_id)
    assert await next_text(attached) == "Hel"
    await stage.say(work, 3, "lo")
    assert await next_text(attached) == "lo"
    await stage.end(work, 5, "!")

    text, end = await text_of_rest(attached)
    assert text == "!"
    assert isinstance(end, Finished)
    entries = await stage.cell.link.send("XRANGE", stage.cell.keys.out("reply:mine"), "-", "+")
    heard = [parse_out(to_entry(raw)[1]) for raw in entries]
    assert [one.text for one in heard if isinstance(one, Frame)] == [b"Hel", b"lo", b"!"]
    assert len([one for one in heard if isinstance(one, End)]) == 1


async def test_a_plain_producers_job_goes_on_on_another_node_for_one_who_follows(caller: Caller, stage: Stage) -> None:
    job_id = await submit_plain(stage)
    first = await stage.give(job_id)
    await stage.say(first, 0, "Hel")
    attached = await caller.attach(job_id)
    assert await next_text(attached) == "Hel"

    await stage.crash(first)
    second = await stage.give(job_id)
    await stage.say(second, 3, "lo")
    await stage.end(second, 5)

    assert (await text_of_rest(attached))[0] == "lo"


async def test_leaving_a_plain_producers_job_does_not_cancel_it(caller: Caller, stage: Stage) -> None:
    job_id = await submit_plain(stage)
    attached = await caller.attach(job_id)

    attached.close()
    await wait_until(lambda: caller.waiting == 0, timeout_s=5)

    assert await state_is(stage, attached, "queued")


async def submit_plain(stage: Stage) -> JobId:
    job_id = JobId("c0-order1")
    answer = await stage.cell.submit(Submission(job_id=job_id, job=chat(), out="reply:mine"))
    assert isinstance(answer, Accepted)
    return job_id


async def test_two_submits_of_one_id_in_one_process_wait_for_one_job(caller: Caller, stage: Stage) -> None:
    options = CallOptions(own_id="order1")
    first, second = await asyncio.gather(
        caller.submit(chat(stream=False), options), caller.submit(chat(stream=False), options)
    )

    work = await stage.give(first.job_id)
    await stage.end(work, 0, "Hello")

    assert first.job_id == second.job_id
    assert await result_of(first) == await result_of(second) == ("Hello", "done")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_whose_client_leaves_at_once_leaves_the_job_to_its_policy(
    caller: Caller, stage: Stage, server: ValkeyServer, stream: bool
) -> None:
    options = CallOptions(policy="cancel", tenant="t", idem_key="k", body_digest="d")
    first = await caller.submit(chat(stream=stream), options)
    server.pause()
    retry = asyncio.create_task(caller.submit(chat(stream=stream), options))
    await asyncio.sleep(0.1)

    retry.cancel()
    first.close()
    server.resume()

    await wait_until(lambda: state_is(stage, first, "cancelled"), timeout_s=5)
    await wait_until(lambda: caller.waiting == 0, timeout_s=5)
