"""Senders and readers beyond their limits."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from bus.api_keys import KeyLimits
from tests.conftest import wait_until
from tests.gateway.conftest import MODEL, Served, quick_settings, whole_fleet
from tests.gateway.test_chatting import read_events, streamed, text_of
from tests.harness.servers import ValkeyServer

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(session_server: ValkeyServer) -> AsyncIterator[tuple[Served, Served]]:
    """One place on one node, two in the queue; slow readers are cut early."""
    session_server.call("FLUSHALL")
    narrow = quick_settings(session_server.url).changed(capacity=1, queue_max=2, sse_buffer_max=65_536)
    async with whole_fleet(narrow) as pair:
        yield pair


async def with_limits(served: Served, limits: KeyLimits) -> dict[str, str]:
    made = await served.gateway.keys.create(["chat"], limits=limits)
    return {"Authorization": f"Bearer {made.key}"}


async def test_a_keys_rate_is_one_rate_over_all_gateways(fleet: tuple[Served, Served]) -> None:
    headers = await with_limits(fleet[0], KeyLimits(rate_per_minute=3))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}

    statuses = [
        (await fleet[turn % 2].call("POST", "/v1/chat/completions", body, headers=headers))[0] for turn in range(5)
    ]

    assert statuses == [200, 200, 200, 429, 429]


async def test_a_key_has_only_so_many_jobs_at_once(fleet: tuple[Served, Served]) -> None:
    first, second = fleet
    headers = await with_limits(first, KeyLimits(jobs_max=1))
    async with streamed(first, "[[delay_ms=30 tokens=100]] a", headers=headers) as got:
        await read_events(got, most=2)
        status, answered, body = await second.call(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, headers=headers
        )
        got.close()

    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answered["Retry-After"]) <= 60


async def test_a_full_queue_is_429_with_a_wait_and_empties_again(fleet: tuple[Served, Served]) -> None:
    first, second = fleet
    await wait_until(lambda: is_idle(first))

    answers = await asyncio.gather(*(fleet[n % 2].chat("[[delay_ms=20 tokens=10]] a") for n in range(12)))

    refused = [(headers, body) for status, headers, body in answers if status == 429]
    assert {status for status, _, _ in answers} == {200, 429}
    assert all(1 <= int(headers["Retry-After"]) <= 60 for headers, _ in refused)
    assert (await second.chat("x"))[0] == 200


async def is_idle(served: Served) -> bool:
    _, _, status = await served.call("GET", "/api/gpu/status", headers={})
    return bool(status["nodes"][0]["running"] == 0)


async def test_a_client_that_does_not_read_is_cut_off_and_can_resume(fleet: tuple[Served, Served]) -> None:
    """The engine never waits for a reader, and the gateway keeps no endless backlog for one."""
    first, second = fleet
    word, tokens = "w" * 4_000, 4_000  # 16 MB: more than all buffers between here and there hold
    async with streamed(first, f"[[tokens={tokens}]] {word}", headers={"X-On-Disconnect": "keep"}) as got:
        job_id = got.headers["X-Job-Id"]

        async def done() -> bool:
            return bool((await second.call("GET", f"/v1/jobs/{job_id}"))[2]["status"] == "done")

        await wait_until(done, timeout_s=20, step_s=0.1)
        with pytest.raises(aiohttp.ClientError):
            await got.content.read()

    near_end = (len(word) + 1) * (tokens - 3) - 1
    headers = {**second.headers, "Last-Event-ID": f"{job_id}.{near_end}"}
    async with second.http.get(f"{second.base}/v1/jobs/{job_id}/events", headers=headers) as resumed:
        events = await read_events(resumed)
    assert text_of(events) == f" {word}" * 3
