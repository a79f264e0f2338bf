"""What a caller makes of a bad server, a bad entry and its own bugs: nobody waits for ever, nothing piles up."""

import asyncio
from typing import Any

import pytest

from bus.calls.caller import Caller, CallOptions
from bus.calls.watch import CHECKS_MAX
from bus.link import Reader, ServerAddress
from tests.caller.stage import SETTINGS, Stage, chat, next_text, state_is, text_of_rest
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer

SAME = CallOptions(policy="keep", tenant="t", idem_key="k", body_digest="d")
END: dict[str, str] = {
    "type": "end", "fence": "x", "state": "done", "reason": "stop", "text_len": "0", "prompt_tokens": "0",
    "new_tokens": "0", "node": "n", "error_code": "", "error_message": "", "retry_after_ms": "0", "text": "",
}  # fmt: skip


@pytest.mark.parametrize("fence", ["x", "x.y", "9" * 5000 + ".a", ""])
async def test_an_end_that_is_not_ours_leaves_everybody_hearing(caller: Caller, stage: Stage, fence: str) -> None:
    hit = await caller.submit(chat())
    spared = await caller.submit(chat())
    work = await stage.give(spared.job_id)
    fields = [word for pair in {**END, "job": hit.job_id, "fence": fence}.items() for word in pair]

    await stage.cell.link.send("XADD", stage.cell.keys.out(caller.out), "*", *fields)
    await stage.say(work, 0, "Hello")

    assert await next_text(spared) == "Hello"


async def test_a_reader_that_failed_is_started_again(caller: Caller, stage: Stage, monkeypatch: Any) -> None:
    read, failures = Reader.xread, iter([True])

    async def failing_once(self: Reader, *args: Any, **options: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("a bug of ours")
        return await read(self, *args, **options)

    handle = await caller.submit(chat())
    work = await stage.give(handle.job_id)
    monkeypatch.setattr(Reader, "xread", failing_once)
    await asyncio.sleep(2 * SETTINGS.block_ms / 1000)

    await stage.say(work, 0, "Hello")

    assert await next_text(handle) == "Hello"
    assert next(failures, None) is None, "it has failed"


async def test_after_a_reconnect_every_job_is_asked_for_however_many_wait(address: ServerAddress, stage: Stage) -> None:
    """The last of them come behind more than can be asked for at a time."""
    async with Caller(address, SETTINGS.changed(silence_ms=60_000)) as caller:
        handles = await asyncio.gather(*(caller.submit(chat(stream=False)) for _ in range(CHECKS_MAX + 50)))
        cell = stage.cell
        last = handles[-1]
        await cell.link.send("DEL", cell.keys.job(last.job_id))

        caller._watch.check_all_soon()

        await wait_until(lambda: state_is(stage, last, "queued"), timeout_s=5)


async def test_many_cancels_do_not_pile_up_while_the_server_hangs(caller: Caller, server: ValkeyServer) -> None:
    handles = await asyncio.gather(*(caller.submit(chat(stream=False)) for _ in range(20)))
    server.pause()
    cancels = [asyncio.create_task(caller.cancel(handle.job_id, "user")) for handle in handles]
    await asyncio.sleep(0.1)
    before = len(asyncio.all_tasks())

    await asyncio.sleep(2.0)

    after = len(asyncio.all_tasks())
    server.resume()
    await asyncio.gather(*cancels, return_exceptions=True)
    assert after <= before + 2 * len(handles) + 8, "at most one cancel and one check of each job are on their way"
    for handle in handles:
        _, ended = await asyncio.wait_for(handle.result(), 5)
        assert ended.state == "cancelled"


async def test_a_follower_waits_until_the_owner_of_a_lost_job_has_driven_it_again(
    caller: Caller, address: ServerAddress, stage: Stage, server: ValkeyServer
) -> None:
    async with Caller(address, SETTINGS.changed(silence_ms=2_500), name="slow") as owner:
        first = await owner.submit(chat(stream=False), SAME)
        follower = await caller.submit(chat(stream=False), SAME)
        assert follower.job_id == first.job_id

        server.call("FLUSHALL")
        await stage.rise()
        await wait_until(lambda: state_is(stage, first, "queued"), timeout_s=8)
        work = await stage.give(first.job_id)
        await stage.end(work, 0, "again")

        for handle in (first, follower):
            text, ended = await asyncio.wait_for(handle.result(), 5)
            assert (text, ended.state) == (b"again", "done")


async def test_a_follower_drives_a_lost_job_again_when_its_owner_does_not(
    caller: Caller, other: Caller, stage: Stage, server: ValkeyServer
) -> None:
    first = await other.submit(chat(stream=False), SAME)
    follower = await caller.submit(chat(stream=False), SAME)
    await other.close(hand_over=True)

    server.call("FLUSHALL")
    await stage.rise()
    await wait_until(lambda: state_is(stage, first, "queued"), timeout_s=8)
    work = await stage.give(first.job_id)
    await stage.end(work, 0, "again")

    text, ended = await asyncio.wait_for(follower.result(), 5)
    assert (text, ended.state) == (b"again", "done")


async def test_a_retry_drives_the_job_it_followed_again_not_another_one(
    caller: Caller, stage: Stage, server: ValkeyServer
) -> None:
    first = await caller.submit(chat(), SAME)
    first.close()
    await wait_until(lambda: caller.waiting == 0, timeout_s=5)
    retry = await caller.submit(chat(), SAME)
    assert retry.job_id == first.job_id

    server.call("FLUSHALL")
    await stage.rise()
    await wait_until(lambda: state_is(stage, retry, "queued"), timeout_s=5)
    work = await stage.give(retry.job_id)
    await stage.end(work, 0, "again")

    assert (await text_of_rest(retry))[0] == "again"
