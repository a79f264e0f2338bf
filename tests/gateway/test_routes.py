"""What every route says to the wrong sender and the wrong body, on a real server without any node."""

import asyncio
from typing import Any

import pytest

from bus.settings import Settings
from tests.gateway.conftest import MODEL, Served, serve

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> dict[str, Any]:
    return {**CHAT, **fields}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/jobs/c0-x"),
        ("DELETE", "/v1/jobs/c0-x"),
        ("GET", "/v1/jobs/c0-x/events"),
        ("POST", "/api/chat"),
        ("POST", "/api/gpu/register"),
        ("POST", "/api/gpu/heartbeat"),
    ],
)
async def test_routes_with_a_key_refuse_without_one(served: Served, method: str, path: str) -> None:
    status, headers, body = await served.call(method, path, {}, headers={})
    assert (status, body["error"]["code"]) == (401, "missing_api_key" if path.startswith("/api") else "invalid_api_key")
    assert "Bearer" in headers["WWW-Authenticate"]

    status, _, body = await served.call(method, path, {}, headers={"Authorization": "Bearer mr_nope"})
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert "mr_nope" not in str(body)


async def test_a_key_opens_only_what_its_scopes_say(settings: Settings) -> None:
    async with serve(settings, scopes=("node",)) as one:
        status, _, body = await one.call("POST", "/api/chat", {"prompt": "x"})
        assert (status, body["error"]["code"]) == (403, "insufficient_scope")

    async with serve(settings, scopes=("chat",)) as one:
        assert (await one.call("POST", "/api/gpu/heartbeat", "n"))[0] == 403


async def test_unknown_urls_and_methods_are_json(served: Served) -> None:
    status, _, body = await served.call("GET", "/v1/nothing")
    assert (status, body["error"]["code"]) == (404, "unknown_url")

    status, headers, body = await served.call("GET", "/api/chat/gpu")
    assert (status, body["success"], body["error"]["code"]) == (405, False, "method_not_allowed")
    assert "POST" in headers["Allow"]


async def test_the_request_id_comes_back_and_is_made_up_when_missing(served: Served) -> None:
    _, headers, _ = await served.call("GET", "/health", headers={"X-Request-Id": "abc-1"})
    assert headers["X-Request-Id"] == "abc-1"

    _, headers, _ = await served.call("GET", "/v1/nothing")
    assert len(headers["X-Request-Id"]) == 32


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(messages=None), "messages"),
        (chat(messages=[]), "messages"),
        (chat(messages="hi"), "messages"),
        (chat(messages=[{"role": "user"}]), "messages[0].content"),
        (chat(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": "a\x00b"}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (chat(model=7), "model"),
        (chat(model="no spaces"), "model"),
        (chat(max_tokens=-1), "max_tokens"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=10**40), "max_tokens"),
        (chat(max_tokens="10"), "max_tokens"),
        (chat(temperature=3), "temperature"),
        (chat(temperature="hot"), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(stop=5), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(n=2), "n"),
    ],
)
async def test_a_wrong_field_of_a_chat_is_named(served: Served, body: dict[str, Any], param: str) -> None:
    status, _, answer = await served.call("POST", "/v1/chat/completions", body)

    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a\x00b"}, "prompt"),
        ({"prompt": "x", "max_new_tokens": -5}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 10**30}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 1.5}, "max_new_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_k": "3"}, "top_k"),
    ],
)
@pytest.mark.parametrize("path", ["/api/chat/gpu", "/api/chat"])
async def test_a_wrong_field_of_a_prompt_is_named(served: Served, path: str, body: dict[str, Any], field: str) -> None:
    headers = {**served.headers, "X-User-Address": "0xabc"}
    status, _, answer = await served.call("POST", path, body, headers=headers)

    assert (status, answer["success"], answer["error"]["field"]) == (400, False, field)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"null", b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b"[" * 3000, b'{"prompt":NaN}'],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat/gpu", "/api/gpu/register"])
async def test_what_is_not_a_json_object_is_400(served: Served, path: str, raw: bytes) -> None:
    status, _, body = await served.call("POST", path, raw=raw)

    assert status == 400
    assert body["error"]["code"] in ("invalid_json", "invalid_request")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat/gpu", "/api/gpu/register", "/api/gpu/heartbeat"])
async def test_a_body_of_ten_megabytes_is_413_and_the_gateway_lives(served: Served, path: str) -> None:
    status, _, body = await served.call("POST", path, raw=b'{"prompt":"' + b"x" * 10_000_000 + b'"}')

    assert (status, body["error"]["code"]) == (413, "body_too_large")
    assert (await served.call("GET", "/health"))[0] == 200


async def test_a_chunked_body_beyond_the_limit_is_413_too(served: Served) -> None:
    """Without a Content-Length the limit holds while the body arrives."""

    async def chunks() -> Any:
        for _ in range(160):
            yield b"x" * 65_536
            await asyncio.sleep(0)

    async with served.http.post(served.base + "/api/chat/gpu", data=chunks()) as response:
        assert response.status == 413


async def test_a_chat_with_an_address_needs_the_address(served: Served) -> None:
    status, _, body = await served.call("POST", "/api/chat", {"prompt": "x"})

    assert (status, body["error"]["code"]) == (400, "missing_user_address")


async def test_the_bearer_scheme_is_read_in_any_case_and_a_body_needs_no_content_type(served: Served) -> None:
    headers = {"authorization": f"bEaReR {served.key}", "Content-Type": ""}
    assert (await served.call("GET", "/v1/models", headers=headers))[0] == 200


async def test_without_a_node_the_fleets_model_is_503_with_a_wait_and_another_is_404(served: Served) -> None:
    status, headers, body = await served.chat("hi")
    assert (status, body["error"]["code"]) == (503, "no_workers")
    assert 1 <= int(headers["Retry-After"]) <= 60

    status, headers, body = await served.call("POST", "/api/chat/gpu", {"prompt": "hi"})
    assert (status, body["error"]["code"]) == (503, "no_node")
    assert body["error"]["retry_after"] == int(headers["Retry-After"])

    status, _, body = await served.call("POST", "/v1/chat/completions", chat(model="gpt-9"))
    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_alive_is_not_ready(served: Served) -> None:
    assert (await served.call("GET", "/health", headers={}))[0] == 200

    status, _, body = await served.call("GET", "/ready", headers={})

    assert status == 503
    assert body["reasons"] == ["no node is registered"]


async def test_metrics_are_prometheus_text(served: Served) -> None:
    await served.call("GET", "/v1/nothing")

    status, headers, text = await served.call("GET", "/metrics", headers={})

    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert b'http_requests_total{handler="unknown",method="GET",status="4xx"}' in text
    for name in ("draft_tokens", "draft_tokens_accepted", "worker_loop_lag_seconds"):
        assert f"millrace_{name} 0".encode() in text


async def test_metrics_can_be_closed(settings: Settings) -> None:
    async with serve(settings.changed(metrics_open=False)) as one:
        assert (await one.call("GET", "/metrics", headers={}))[0] == 401
        assert (await one.call("GET", "/metrics"))[0] == 403


async def test_the_open_chat_can_be_closed(settings: Settings) -> None:
    async with serve(settings.changed(open_chat=False)) as one:
        status, _, body = await one.call("POST", "/api/chat/gpu", {"prompt": "x"}, headers={})

    assert (status, body["error"]["code"]) == (403, "route_closed")


async def test_the_open_route_is_limited_per_address_over_all_gateways(settings: Settings) -> None:
    """60 a minute is 60 a minute, however many gateways there are."""
    limited = settings.changed(open_rate_per_minute=3)
    async with serve(limited) as first, serve(limited) as second:
        statuses = [
            (await one.call("POST", "/api/chat/gpu", {"prompt": "x"}, headers={}))[0]
            for one in (first, second, first, second, first)
        ]
        _, headers, body = await second.call("POST", "/api/chat/gpu", {"prompt": "x"}, headers={})

    assert statuses == [503, 503, 503, 429, 429]
    assert body["error"]["code"] == "rate_limited"
    assert 1 <= int(headers["Retry-After"]) <= 60


async def test_a_stopping_gateway_is_not_ready_and_takes_no_chat(served: Served) -> None:
    served.gateway.life.draining = True

    status, _, body = await served.call("GET", "/ready", headers={})
    assert (status, body["reasons"]) == (503, ["this gateway is shutting down"])

    status, headers, body = await served.chat("hi")
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")


@pytest.mark.parametrize("job", ["c0-unknown", "c9-x", "nonsense", "c0-" + "x" * 300])
async def test_an_unknown_job_is_404(served: Served, job: str) -> None:
    for method, path in [("GET", f"/v1/jobs/{job}"), ("DELETE", f"/v1/jobs/{job}"), ("GET", f"/v1/jobs/{job}/events")]:
        status, _, body = await served.call(method, path)
        assert (status, body["error"]["code"]) == (404, "job_not_found")
