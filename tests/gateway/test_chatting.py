"""Chats end to end: gateways, dispatcher, registry and an echo worker on a real server."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import orjson
import pytest
import pytest_asyncio

from tests.conftest import wait_until
from tests.gateway.conftest import MODEL, Served, quick_settings, serve, whole_fleet
from tests.harness.servers import ValkeyServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

Pair = tuple[Served, Served]
Event = dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(session_server: ValkeyServer) -> AsyncIterator[Pair]:
    """One fleet for all tests of this file: each uses jobs of its own."""
    session_server.call("FLUSHALL")
    async with whole_fleet(quick_settings(session_server.url)) as pair:
        yield pair


async def read_events(response: aiohttp.ClientResponse, most: int | None = None) -> list[Event]:
    """Events of a stream as {"id", "data"}; comments as {"comment"}. Stops after `most` or at its end."""
    events: list[Event] = []
    event: Event = {}
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            events.append({"comment": line})
        elif line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif event:
            events.append(event)
            event = {}
            if most is not None and len(events) >= most:
                break
    return events


def chunks(events: list[Event]) -> list[dict[str, Any]]:
    return [orjson.loads(event["data"]) for event in events if event.get("data", "[DONE]") != "[DONE]"]


def text_of(events: list[Event]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks(events) for choice in chunk.get("choices", ())
    )


def streamed(served: Served, content: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True, **fields}
    return served.http.post(
        served.base + "/v1/chat/completions", data=orjson.dumps(body), headers={**served.headers, **(headers or {})}
    )


async def job_state(served: Served, job_id: str) -> str:
    _, _, body = await served.call("GET", f"/v1/jobs/{job_id}")
    return str(body["status"])


# --- whole answers --------------------------------------------------------------------------------------------------


async def test_a_plain_chat_is_answered(fleet: Pair) -> None:
    status, headers, body = await fleet[0].chat("one two three")

    assert status == 200
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "one two three", "refusal": None}
    assert (choice["finish_reason"], body["model"], body["object"]) == ("stop", MODEL, "chat.completion")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body["id"] == "chatcmpl-" + headers["X-Job-Id"]


async def test_a_completion_is_answered(fleet: Pair) -> None:
    status, _, body = await fleet[0].call("POST", "/v1/completions", {"model": MODEL, "prompt": "one two"})

    assert (status, body["choices"][0]["text"], body["object"]) == (200, "one two", "text_completion")


async def test_the_simple_routes_answer(fleet: Pair) -> None:
    first, second = fleet
    status, _, body = await first.call(
        "POST", "/api/chat/gpu", {"prompt": "Hello there", "max_new_tokens": 50}, headers={}
    )
    assert status == 200
    assert (body["success"], body["response"], body["node_id"]) == (True, "Hello there", "echo-1")
    assert body["inference_time"] > 0

    headers = {**second.headers, "X-User-Address": "0xabc"}
    status, _, body = await second.call("POST", "/api/chat", {"prompt": "Hello", "max_new_tokens": 5}, headers=headers)
    assert (status, body["response"]) == (200, "Hello")


async def test_the_length_cuts_an_answer_and_says_so(fleet: Pair) -> None:
    _, _, body = await fleet[0].chat("one two three four", max_tokens=2)

    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("one two", "length")


async def test_models_are_those_that_are_served(fleet: Pair) -> None:
    first, second = fleet
    status, _, body = await first.call("GET", "/v1/models")
    assert (status, [model["id"] for model in body["data"]]) == (200, [MODEL])

    assert (await second.call("GET", f"/v1/models/{MODEL}"))[0] == 200
    status, _, body = await second.call("GET", "/v1/models/org/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


# --- streams --------------------------------------------------------------------------------------------------------


async def test_a_stream_has_the_form_that_clients_parse(fleet: Pair) -> None:
    async with streamed(fleet[0], "[[delay_ms=40 tokens=5]] a b c d e", stream_options={"include_usage": True}) as got:
        assert (got.status, got.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert (got.headers["Cache-Control"], got.headers["X-Accel-Buffering"]) == ("no-cache", "no")
        assert "Content-Length" not in got.headers
        events = await read_events(got)

    parsed = chunks(events)
    assert events[-1]["data"] == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in parsed}) == 1
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert sum("role" in choice["delta"] for chunk in parsed for choice in chunk["choices"]) == 1
    assert text_of(events) == "a b c d e"
    reasons = [choice["finish_reason"] for chunk in parsed for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["stop"]
    assert (parsed[-1]["choices"], parsed[-1]["usage"]["completion_tokens"]) == ([], 5)
    assert parsed[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in parsed[:-1])
    assert len(parsed) > 4, "tokens come as they are made, not all at the end"


async def test_without_the_option_there_is_no_usage_and_no_chunk_without_choices(fleet: Pair) -> None:
    async with streamed(fleet[0], "a b c") as got:
        parsed = chunks(await read_events(got))

    assert all(chunk["choices"] and "usage" not in chunk for chunk in parsed)


async def test_whole_characters_only(fleet: Pair) -> None:
    text = "grüße 水車 🎡 naïve " * 5
    async with streamed(fleet[0], f"[[delay_ms=2]] {text}") as got:
        events = await read_events(got)

    assert text_of(events) == " ".join(text.split())


async def test_a_long_silence_is_filled_with_comments(fleet: Pair) -> None:
    """Proxies cut at 50-120 s of silence; SDKs skip comments."""
    pinging = fleet[0].gateway.settings.changed(sse_ping_ms=100)
    async with serve(pinging) as one, streamed(one, "[[first_ms=900]] a b") as got:
        events = await read_events(got)

    assert [event["comment"] for event in events if "comment" in event][:2] == [": ping", ": ping"]
    assert text_of(events) == "a b"


async def test_event_ids_lead_on_from_another_gateway(fleet: Pair) -> None:
    """The client's gateway is gone or slow: the same job goes on where its last event id says."""
    first, second = fleet
    words = " ".join(f"w{number}" for number in range(40))
    async with streamed(first, f"[[delay_ms=20]] {words}") as got:
        job_id = got.headers["X-Job-Id"]
        shown = await read_events(got, most=8)
        last_id = shown[-1]["id"]

        headers = {**second.headers, "Last-Event-ID": last_id}
        async with second.http.get(f"{second.base}/v1/jobs/{job_id}/events", headers=headers) as resumed:
            assert resumed.status == 200
            rest = await read_events(resumed)

    assert text_of(shown) + text_of(rest) == words
    assert rest[-1]["data"] == "[DONE]"
    assert not any("role" in choice["delta"] for chunk in chunks(rest) for choice in chunk["choices"])
    assert chunks(rest)[0]["id"] == chunks(shown)[0]["id"]


async def test_a_stream_that_moved_ends_here_with_taken_over(fleet: Pair) -> None:
    first, second = fleet
    async with streamed(first, "[[delay_ms=20 tokens=60]] a b c") as got:
        job_id = got.headers["X-Job-Id"]
        await read_events(got, most=3)
        async with second.http.get(f"{second.base}/v1/jobs/{job_id}/events", headers=second.headers) as resumed:
            rest = await read_events(resumed)
        left = await read_events(got)

    assert chunks(left)[-1]["error"]["code"] == "taken_over"
    assert left[-1]["data"] == "[DONE]"
    assert text_of(rest).split() == list(itertools.islice(itertools.cycle("abc"), 60))


async def test_an_ended_job_can_still_be_read_from_its_beginning(fleet: Pair) -> None:
    first, second = fleet
    _, headers, _ = await first.chat("one two three")
    job_id = headers["X-Job-Id"]

    async with second.http.get(f"{second.base}/v1/jobs/{job_id}/events", headers=second.headers) as got:
        events = await read_events(got)
    _, _, job = await second.call("GET", f"/v1/jobs/{job_id}")

    assert text_of(events) == "one two three"
    assert (job["status"], job["text"], job["usage"]["completion_tokens"]) == ("done", "one two three", 3)


async def test_a_foreign_event_id_is_400(fleet: Pair) -> None:
    _, headers, _ = await fleet[0].chat("one")

    status, _, body = await fleet[0].call(
        "GET",
        f"/v1/jobs/{headers['X-Job-Id']}/events",
        headers={**fleet[0].headers, "Last-Event-ID": "c0-other.5"},
    )

    assert (status, body["error"]["param"]) == (400, "Last-Event-ID")


# --- failures -------------------------------------------------------------------------------------------------------


async def test_a_failure_before_the_first_text_is_a_plain_error(fleet: Pair) -> None:
    """An error inside a 200 is what clients take for an empty success."""
    async with streamed(fleet[0], "[[fail_at=0 fault=client]] a b") as got:
        body = orjson.loads(await got.read())

    assert (got.status, body["error"]["code"]) == (400, "bad_request")


async def test_a_failure_in_mid_stream_is_an_event_then_done(fleet: Pair) -> None:
    async with streamed(fleet[0], "[[delay_ms=30 fail_at=4 fault=client tokens=9]] a b c") as got:
        events = await read_events(got)

    assert got.status == 200
    assert set(chunks(events)[-1]["error"]) == {"message", "type", "param", "code"}
    assert events[-1]["data"] == "[DONE]"
    assert not any(c.get("finish_reason") for chunk in chunks(events) for c in chunk.get("choices", ()))


async def test_a_deadline_is_504_and_must_not_be_repeated(fleet: Pair) -> None:
    status, headers, body = await fleet[0].call(
        "POST",
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "[[first_ms=5000]] a"}]},
        headers={**fleet[0].headers, "X-Deadline-Ms": "300"},
    )

    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert headers["x-should-retry"] == "false"


# --- clients that go away, and those who come twice ---------------------------------------------------------------


async def test_a_stream_whose_client_is_gone_is_cancelled(fleet: Pair) -> None:
    first, second = fleet
    async with streamed(first, "[[delay_ms=50 tokens=2000]] a b") as got:
        job_id = got.headers["X-Job-Id"]
        await read_events(got, most=2)
        got.close()

    async def cancelled() -> bool:
        return await job_state(second, job_id) == "cancelled"

    await wait_until(cancelled)
    assert first.gateway.life.open_chats == 0


async def test_a_plain_chat_whose_client_is_gone_is_cancelled(fleet: Pair) -> None:
    """aiohttp does not notice by itself: without handler_cancellation the job would run on for nobody."""
    first, second = fleet
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(first.chat("[[delay_ms=50 tokens=2000]] a b"), 0.4)

    async def nothing_runs() -> bool:
        _, _, status = await second.call("GET", "/api/gpu/status", headers={})
        return bool(status["nodes"][0]["running"] == 0)

    await wait_until(nothing_runs)


async def test_a_client_may_ask_that_its_job_is_kept(fleet: Pair) -> None:
    first, second = fleet
    async with streamed(first, "[[delay_ms=10 tokens=60]] a", headers={"X-On-Disconnect": "keep"}) as got:
        job_id = got.headers["X-Job-Id"]
        await read_events(got, most=2)
        got.close()

    async def done() -> bool:
        return await job_state(second, job_id) == "done"

    await wait_until(done)


async def test_a_job_can_be_cancelled_by_its_id_from_any_gateway(fleet: Pair) -> None:
    first, second = fleet
    async with streamed(first, "[[delay_ms=50 tokens=2000]] a b") as got:
        job_id = got.headers["X-Job-Id"]
        await read_events(got, most=2)

        status, _, body = await second.call("DELETE", f"/v1/jobs/{job_id}")
        rest = await read_events(got)

    assert (status, body["status"]) in [(202, "cancelling"), (200, "cancelled")]
    assert chunks(rest)[-1]["error"]["code"] == "cancelled"
    status, _, body = await second.call("DELETE", f"/v1/jobs/{job_id}")
    assert (status, body["status"]) == (200, "cancelled")


async def test_another_key_sees_nothing_of_a_job(fleet: Pair) -> None:
    _, headers, _ = await fleet[0].chat("secret words")
    stranger = await fleet[0].gateway.keys.create(["chat"])

    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/events")]:
        status, _, _ = await fleet[0].call(
            method, f"/v1/jobs/{headers['X-Job-Id']}{path}", headers={"Authorization": f"Bearer {stranger.key}"}
        )
        assert status == 404


async def test_the_same_idempotency_key_and_body_is_one_job(fleet: Pair) -> None:
    first, second = fleet
    body = {"model": MODEL, "messages": [{"role": "user", "content": "[[delay_ms=20]] a b c d e f"}]}

    answers = await asyncio.gather(
        *(
            one.call("POST", "/v1/chat/completions", body, headers={**one.headers, "Idempotency-Key": "k1"})
            for one in (first, second, first)
        )
    )

    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert len({headers["X-Job-Id"] for _, headers, _ in answers}) == 1
    assert {answer["choices"][0]["message"]["content"] for _, _, answer in answers} == {"a b c d e f"}


async def test_the_same_idempotency_key_with_another_body_is_422(fleet: Pair) -> None:
    """409 would be retried by SDKs."""
    headers = {**fleet[0].headers, "Idempotency-Key": "k2"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    await fleet[0].call("POST", "/v1/chat/completions", body, headers=headers)

    status, _, answer = await fleet[1].call("POST", "/v1/chat/completions", {**body, "max_tokens": 3}, headers=headers)

    assert (status, answer["error"]["code"]) == (422, "idempotency_key_reused")


async def test_many_clients_wait_at_once_and_each_gets_its_own_answer(fleet: Pair) -> None:
    async def one(number: int) -> bool:
        _, _, body = await fleet[number % 2].chat(f"[[delay_ms=2]] n{number} x y")
        return bool(body["choices"][0]["message"]["content"] == f"n{number} x y")

    assert all(await asyncio.gather(*(one(number) for number in range(100))))


# --- the openai package -------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(fleet: Pair) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=fleet[0].key, base_url=fleet[0].base + "/v1", max_retries=0) as sdk:
        yield sdk


async def test_the_openai_package_chats(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "one two"}])

    assert answer.choices[0].message.content == "one two"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4


async def test_the_openai_package_streams(sdk: openai.AsyncOpenAI) -> None:
    pieces, reasons, usage = [], [], None
    stream = await sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "[[delay_ms=10]] one two three"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
        usage = chunk.usage or usage

    assert "".join(pieces) == "one two three"
    assert [reason for reason in reasons if reason] == ["stop"]
    assert usage is not None and usage.completion_tokens == 3


async def test_the_openai_package_completes(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="one two")
    assert answer.choices[0].text == "one two"

    stream = await sdk.completions.create(model=MODEL, prompt="[[delay_ms=5]] one two three", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two three"


async def test_the_openai_package_lists_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).owned_by == "millrace"


async def test_log_probabilities_that_nobody_has_or_may_ask_for_are_refused_by_name(sdk: openai.AsyncOpenAI) -> None:
    hello: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match=f"logprobs: no node that serves the model {MODEL}") as bad:
        await sdk.chat.completions.create(model=MODEL, messages=hello, logprobs=True)
    assert bad.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError, match="needs logprobs to be true") as bad:
        await sdk.chat.completions.create(model=MODEL, messages=hello, top_logprobs=2)
    assert bad.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="between 0 and 5") as bad:
        await sdk.completions.create(model=MODEL, prompt="x", logprobs=6)
    assert bad.value.param == "logprobs"


async def test_the_openai_package_raises_its_own_errors(sdk: openai.AsyncOpenAI) -> None:
    hello: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model=MODEL, messages=hello, temperature=9)
    assert bad.value.param == "temperature"

    with pytest.raises(openai.NotFoundError) as gone:
        await sdk.chat.completions.create(model="gpt-9", messages=hello)
    assert gone.value.code == "model_not_found"

    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="mr_wrong").models.list()


async def test_the_openai_package_raises_what_fails_in_mid_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "[[delay_ms=400 fail_at=2 fault=client tokens=5]] a b"}],
        stream=True,
    )

    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
