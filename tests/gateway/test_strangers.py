"""What a gateway says to requests that are not HTTP, not theirs to make, or too many; and what it does not say."""

import asyncio
import logging

import orjson
import pytest

from bus.settings import Settings
from tests.conftest import wait_until
from tests.gateway.conftest import MODEL, Served, serve, whole_fleet


async def say_raw(served: Served, raw: bytes) -> bytes:
    host, _, port = served.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


async def test_a_malformed_request_costs_one_line_without_what_it_held(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """The bad header may be the one with the key."""
    caplog.set_level(logging.DEBUG)

    answer = await say_raw(served, b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mr_SECRET\x01\r\n\r\n")

    assert b" 400 Bad Request" in answer.partition(b"\r\n")[0]
    assert "mr_SECRET" not in caplog.text
    [line] = [record for record in caplog.records if record.message == "malformed request"]
    assert line.levelno == logging.WARNING
    assert line.exc_info is None


async def test_a_body_that_is_not_encoded_as_it_says_is_400(served: Served) -> None:
    status, _, body = await served.call(
        "POST",
        "/v1/chat/completions",
        raw=b"this is not gzip",
        headers={**served.headers, "Content-Encoding": "gzip", "Content-Type": "application/json"},
    )

    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_the_events_of_a_job_cannot_be_asked_for_with_head(served: Served) -> None:
    """It would take the stream over, and its answer has no room for a body."""
    async with served.http.head(served.base + "/v1/jobs/c0-x/events", headers=served.headers) as got:
        assert got.status == 405


async def test_the_open_status_is_limited_apart_from_chats(settings: Settings) -> None:
    async with serve(settings.changed(open_rate_per_minute=15, status_rate_per_minute=15)) as one:
        answers = [(await one.call("GET", "/api/gpu/status", headers={}))[0] for _ in range(16)]
        chat_status, _, _ = await one.call("POST", "/api/chat/gpu", {"prompt": "x"}, headers={})

    assert answers == [200] * 15 + [429]
    assert chat_status == 503, "no node, but no limit either"


async def test_an_event_id_beyond_the_answer_is_400(settings: Settings) -> None:
    async with whole_fleet(settings) as (one, _):
        _, headers, _ = await one.chat("one two")
        job_id = headers["X-Job-Id"]

        status, _, body = await one.call(
            "GET", f"/v1/jobs/{job_id}/events", headers={**one.headers, "Last-Event-ID": f"{job_id}.99"}
        )

    assert (status, body["error"]["param"]) == (400, "Last-Event-ID")


async def test_a_plain_producers_job_is_shown_to_admins_only_and_its_stream_stays_his(settings: Settings) -> None:
    """His ids may be guessed by anybody: order1, order2 ..."""
    async with whole_fleet(settings) as (one, _):
        cell = one.gateway.caller.cells[0]
        admin = {"Authorization": f"Bearer {(await one.gateway.keys.create(['admin'])).key}"}
        words = " ".join(f"word{number}" for number in range(60))
        job = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": words}]})
        await cell.link.send("XADD", cell.keys.jobs, "*", "job", job, "id", "order1")

        async def is_admitted() -> bool:
            return (await one.call("GET", "/v1/jobs/c0-order1", headers=admin))[0] == 200

        await wait_until(is_admitted, timeout_s=5)
        for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/events")]:
            assert (await one.call(method, f"/v1/jobs/c0-order1{path}"))[0] == 404
        status, _, events = await one.call("GET", "/v1/jobs/c0-order1/events", headers=admin)

        assert status == 200
        chunks = [orjson.loads(line[6:]) for line in events.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == words
        entries = await cell.link.send("XRANGE", cell.keys.out("reply:c0-order1"), "-", "+")
        assert [b"end" in fields for _, fields in entries].count(True) == 1
