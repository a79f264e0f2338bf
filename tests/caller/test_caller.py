"""A caller's promises on a real server: one end for each job, no gap and no repeat, whatever is lost on the way."""

import asyncio

import pytest

from bus.calls.caller import Caller, CallOptions, Refusal, UnknownJob
from bus.calls.handle import Detached, Finished, JobHandle
from bus.calls.outstream import read_count
from bus.codec.wire import Ended as EndedJob
from bus.link import Link, ServerAddress
from tests.caller.stage import SETTINGS, Stage, chat, next_text, state_is, text_of, text_of_rest
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer


async def test_a_streamed_answer_comes_whole_and_ends_once(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat())
    work = await stage.give(handle.job_id)

    await stage.say(work, 0, "Hel")
    await stage.say(work, 3, "lo")
    await stage.end(work, 5, "!")

    text, end = await text_of(handle)
    assert text == "Hello!"
    assert isinstance(end, Finished)
    assert (end.ended.state, end.ended.reason, end.ended.new_tokens, end.ended.node) == ("done", "stop", 5, "n1")
    assert caller.waiting == 0


async def test_an_answer_that_is_not_streamed_comes_with_its_end(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat(stream=False))
    work = await stage.give(handle.job_id)

    await stage.end(work, 0, "Hello")

    text, ended = await asyncio.wait_for(handle.result(), 5)
    assert (text, ended.state) == (b"Hello", "done")


async def test_an_answer_too_long_for_the_terminal_is_read_from_the_store(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat(stream=False))
    work = await stage.give(handle.job_id)
    long = "word " * 80_000

    await stage.end(work, 0, long)

    text, _ = await asyncio.wait_for(handle.result(), 5)
    assert text.decode() == long


async def test_a_model_that_nobody_serves_is_refused_with_the_reason(caller: Caller) -> None:
    with pytest.raises(Refusal) as refused:
        await caller.submit(chat(model="nobody-has-this"))

    assert refused.value.code == "no_model"
    assert "nobody-has-this" in refused.value.reason
    assert caller.waiting == 0


async def test_a_stream_goes_on_where_a_dead_worker_left_it(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat())
    first = await stage.give(handle.job_id)
    await stage.say(first, 0, "Hel")
    assert await next_text(handle) == "Hel"

    await stage.crash(first)
    second = await stage.give(handle.job_id)
    await stage.say(first, 3, "XXX")  # a zombie speaks
    await stage.say(second, 3, "lo")
    await stage.end(second, 5)

    text, end = await text_of_rest(handle)
    assert text == "lo"
    assert isinstance(end, Finished)
    assert end.ended.attempts == 2


async def test_frames_that_were_lost_are_read_from_the_stored_text(
    caller: Caller, stage: Stage, server: ValkeyServer
) -> None:
    handle = await caller.submit(chat())
    work = await stage.give(handle.job_id)
    out = stage.cell.keys.out(caller.out)

    transaction = stage.cell.link  # one write: the caller's blocked read sees only what the last command left
    said = asyncio.gather(stage.say(work, 0, "Hel"), _deleted(transaction, out), stage.say(work, 3, "lo"))
    await said
    await stage.end(work, 5)

    text, _ = await text_of(handle)
    assert text == "Hello"


async def _deleted(link: Link, out: str) -> None:
    await link.send("XTRIM", out, "MAXLEN", 0)


async def test_a_job_that_the_server_has_forgotten_is_driven_again(
    caller: Caller, stage: Stage, server: ValkeyServer
) -> None:
    handle = await caller.submit(chat())
    first = await stage.give(handle.job_id)
    await stage.say(first, 0, "Hel")
    assert await next_text(handle) == "Hel"

    server.call("FLUSHALL")
    await stage.rise()
    await wait_until(lambda: _is_queued(stage, handle), timeout_s=5)
    again = await stage.give(handle.job_id)
    assert again.text_len == 3, "what was shown is the new attempt's progress"
    assert int(again.fence.split(".")[0]) == 2
    await stage.say(again, 3, "lo")
    await stage.end(again, 5)

    text, end = await text_of_rest(handle)
    assert text == "lo"
    assert isinstance(end, Finished)


async def _is_queued(stage: Stage, handle: JobHandle) -> bool:
    record = await stage.cell.job(handle.job_id)
    return record is not None and record.state == "queued"


async def test_an_end_that_was_missed_is_found_by_asking(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat(stream=False))
    work = await stage.give(handle.job_id)
    out = stage.cell.keys.out(caller.out)

    await asyncio.gather(stage.end(work, 0, "Hello"), _deleted(stage.cell.link, out))

    text, ended = await asyncio.wait_for(handle.result(), 5)
    assert (text, ended.state) == (b"Hello", "done")


async def test_another_caller_takes_a_stream_over_and_misses_nothing(
    caller: Caller, stage: Stage, address: ServerAddress
) -> None:
    handle = await caller.submit(chat())
    work = await stage.give(handle.job_id)
    await stage.say(work, 0, "Hel")
    assert await next_text(handle) == "Hel"

    async with Caller(address, SETTINGS) as other:
        resumed = await other.attach(handle.job_id, offset=2)
        await stage.say(work, 3, "lo")
        assert isinstance(await handle.next(5), Detached)
        await stage.end(work, 5)

        text, _ = await text_of_rest(resumed)

    assert text == "llo"


async def test_an_ended_job_can_be_read_by_anyone_as_long_as_it_is_kept(
    caller: Caller, stage: Stage, address: ServerAddress
) -> None:
    handle = await caller.submit(chat(stream=False))
    work = await stage.give(handle.job_id)
    await stage.end(work, 0, "Hello")
    await asyncio.wait_for(handle.result(), 5)

    async with Caller(address, SETTINGS) as other:
        text, end = await text_of(await other.attach(handle.job_id))

    assert text == "Hello"
    assert isinstance(end, Finished)
    assert end.ended.state == "done"


async def test_an_unknown_job_is_said_to_be_unknown(caller: Caller) -> None:
    for job_id in ("c0-nothing", "c9-nothing", "nonsense"):
        with pytest.raises(UnknownJob):
            await caller.attach(job_id)
        with pytest.raises(UnknownJob):
            await caller.cancel(job_id, "test")


async def test_a_client_that_went_away_cancels_its_job_after_the_grace(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat())

    handle.close()

    await wait_until(lambda: state_is(stage, handle, "cancelled"), timeout_s=5)
    assert caller.waiting == 0


async def test_a_client_that_comes_back_within_the_grace_keeps_its_job(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat())
    handle.close()

    again = await caller.attach(handle.job_id)
    await asyncio.sleep(SETTINGS.client_grace_ms / 1000 * 3)

    assert await state_is(stage, again, "queued")


async def test_a_job_to_be_kept_outlives_its_client(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(chat(), CallOptions(policy="keep"))

    handle.close()
    await wait_until(lambda: caller.waiting == 0, timeout_s=5)

    assert await state_is(stage, handle, "queued")


async def test_a_cancel_ends_a_waiting_job_at_once(caller: Caller) -> None:
    handle = await caller.submit(chat())

    result = await caller.cancel(handle.job_id, "test")

    assert isinstance(result, EndedJob)
    _, ended = await asyncio.wait_for(handle.result(), 5)
    assert ended.state == "cancelled"


async def test_the_same_idempotency_key_follows_the_same_job(
    caller: Caller, stage: Stage, address: ServerAddress
) -> None:
    options = CallOptions(tenant="t", idem_key="k", body_digest="d")
    first = await caller.submit(chat(stream=False), options)
    async with Caller(address, SETTINGS) as other:
        second = await other.submit(chat(stream=False), options)
        third = await caller.submit(chat(stream=False), options)
        assert first.job_id == second.job_id == third.job_id
        work = await stage.give(first.job_id)
        await stage.end(work, 0, "Hello")

        answers = await asyncio.wait_for(asyncio.gather(first.result(), second.result(), third.result()), 10)

    assert [text for text, _ in answers] == [b"Hello"] * 3


async def test_another_body_under_the_same_idempotency_key_is_refused(caller: Caller) -> None:
    await caller.submit(chat(), CallOptions(tenant="t", idem_key="k", body_digest="d"))

    with pytest.raises(Refusal) as refused:
        await caller.submit(chat(), CallOptions(tenant="t", idem_key="k", body_digest="other"))

    assert refused.value.code == "idem_conflict"
    assert caller.waiting == 1


def test_a_read_takes_about_a_quarter_of_what_is_waited_for() -> None:
    """So that callers and the bus work at the same time, and not in turns."""
    assert [read_count(waiting) for waiting in (0, 1, 32, 256, 10_000)] == [8, 8, 8, 64, 512]
