"""Nodes over HTTP: registered on one gateway, seen on all; owned by the key that registered them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import registry_consumer.service
from bus.api_keys import KeyLimits
from bus.codec.wire import LockTaken
from bus.ids import NodeId
from bus.settings import Settings
from gateway.nodes_wire import STATUS_ACTIVE, STATUS_INACTIVE
from tests.conftest import wait_until
from tests.gateway.conftest import Served, running, serve
from tests.harness.fake_openai import FakeNode, Knobs
from tests.harness.servers import free_port


@pytest.fixture
async def pair(settings: Settings) -> AsyncIterator[tuple[Served, Served]]:
    """Two gateways and a registry consumer."""
    async with running(registry_consumer.service.run, settings), serve(settings) as first, serve(settings) as second:
        second.key = first.key
        yield first, second


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    async with FakeNode(Knobs(model="fake-model")) as node:
        yield node


def registration(url: str, node_id: str = "test-node", **capabilities: Any) -> dict[str, Any]:
    return {"node_id": node_id, "api_url": url, "capabilities": {"gpu_memory_gb": 24, **capabilities}}


async def shown(served: Served, node_id: str = "test-node") -> dict[str, Any] | None:
    _, _, status = await served.call("GET", "/api/gpu/status", headers={})
    assert status["total_nodes"] == len(status["nodes"])
    return next((one for one in status["nodes"] if one["node_id"] == node_id), None)


async def test_a_registered_node_is_on_every_gateway_at_once(pair: tuple[Served, Served], node: FakeNode) -> None:
    """The answer waits for the registry, so no poll is needed: five status calls in a row on each gateway show it."""
    first, second = pair

    status, _, body = await first.call("POST", "/api/gpu/register", registration(node.url, layers=[0, 1, 2, 3]))

    assert status == 200
    assert (body["success"], body["node_id"], body["layers_assigned"], body["status"]) == (
        True, "test-node", [0, 1, 2, 3], "active",
    )  # fmt: skip
    for served in (second, first) * 5:
        seen = await shown(served)
        assert seen is not None
        assert (seen["status"], seen["type"], seen["layers"]) == (STATUS_ACTIVE, "http", [0, 1, 2, 3])


async def test_what_is_left_out_is_asked_or_assigned(pair: tuple[Served, Served], node: FakeNode) -> None:
    status, _, body = await pair[0].call("POST", "/api/gpu/register", registration(node.url))

    assert status == 200
    assert body["models"] == ["fake-model"]
    assert body["layers_assigned"] == [0, 1, 2, 3]  # the least covered range that 24 GB hold
    assert body["max_concurrency"] == 4


async def test_what_the_owner_says_that_his_node_can_do_reaches_the_dispatchers(
    pair: tuple[Served, Served], node: FakeNode
) -> None:
    found = []
    every: list[dict[str, Any]] = [{}, {"can": []}, {"can": ["logprobs"]}]
    for said in every:
        await pair[0].call("POST", "/api/gpu/register", registration(node.url, model="a", **said))
        view = await pair[0].gateway.caller.cell_of("a").node(NodeId("test-node"))
        found.append(None if view is None else view.can)

    assert found == [None, (), ("logprobs",)]


async def test_both_forms_of_a_heartbeat_keep_a_node_active(pair: tuple[Served, Served], node: FakeNode) -> None:
    first, second = pair
    await first.call("POST", "/api/gpu/register", registration(node.url))

    for body in ("test-node", {"node_id": "test-node"}):
        status, _, answer = await second.call("POST", "/api/gpu/heartbeat", body)
        assert (status, answer["success"]) == (200, True)


async def test_a_node_without_heartbeats_turns_inactive_still_counts_and_comes_back(
    settings: Settings, node: FakeNode
) -> None:
    quick = settings.changed(node_ttl_ms=500, beat_ms=100)
    async with running(registry_consumer.service.run, quick), serve(quick) as one:
        await one.call("POST", "/api/gpu/register", registration(node.url))

        async def seen_as(status: str) -> bool:
            node = await shown(one)
            assert node is not None
            return bool(node["status"] == status)

        await wait_until(lambda: seen_as(STATUS_INACTIVE))
        await one.call("POST", "/api/gpu/heartbeat", "test-node")
        await wait_until(lambda: seen_as(STATUS_ACTIVE))


async def test_an_unknown_node_cannot_beat(pair: tuple[Served, Served]) -> None:
    status, _, body = await pair[0].call("POST", "/api/gpu/heartbeat", "nobody")

    assert (status, body["error"]["code"]) == (404, "node_not_found")
    assert await shown(pair[0], "nobody") is None


async def test_another_key_can_neither_beat_nor_register_a_node(pair: tuple[Served, Served], node: FakeNode) -> None:
    first, _ = pair
    await first.call("POST", "/api/gpu/register", registration(node.url))
    other = await first.gateway.keys.create(["node", "admin"], limits=KeyLimits())
    headers = {"Authorization": f"Bearer {other.key}"}

    for path, body in [("register", registration(node.url)), ("heartbeat", "test-node")]:
        status, _, answer = await first.call("POST", f"/api/gpu/{path}", body, headers=headers)
        assert (status, answer["error"]["code"]) == (403, "not_owner")


async def test_the_owner_may_register_again_with_other_capabilities(
    pair: tuple[Served, Served], node: FakeNode
) -> None:
    first, second = pair
    await first.call("POST", "/api/gpu/register", registration(node.url, layers=[0, 1], model="a"))

    status, _, _ = await second.call(
        "POST", "/api/gpu/register", registration(node.url, layers=[5], model="b", max_concurrency=9)
    )

    seen = await shown(first)
    assert status == 200
    assert seen is not None
    assert (seen["layers"], seen["models"], seen["max_concurrency"]) == ([5], ["b"], 9)


async def test_racing_registrations_of_one_id_leave_the_last_one_that_succeeded(
    pair: tuple[Served, Served], node: FakeNode
) -> None:
    """The lock lets one in at a time, the fencing token orders them: never a mixture, never two winners."""
    node.knobs.health_ms = 20
    outcomes = await asyncio.gather(
        *(
            pair[number % 2].call("POST", "/api/gpu/register", registration(node.url, model="m", layers=[number]))
            for number in range(8)
        )
    )

    won = [body["layers_assigned"] for status, _, body in outcomes if status == 200]
    lost = {(status, body["error"]["code"]) for status, _, body in outcomes if status != 200}
    assert won
    assert lost <= {(409, "registration_in_progress"), (409, "superseded")}
    seen = await shown(pair[0])
    assert seen is not None
    assert seen["layers"] in won
    assert seen == {**(await shown(pair[1]) or {}), "last_heartbeat_age_s": seen["last_heartbeat_age_s"]}


def health_says(status: int, body: bytes = b"", **headers: str) -> web.Application:
    async def health(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    app = web.Application()
    app.router.add_get("/health", health)
    return app


@pytest.mark.parametrize(
    "app",
    [
        health_says(500),
        health_says(302, Location="http://127.0.0.1:1/"),
        health_says(200, b"x" * 1_000_000),
        health_says(404),  # and no /v1/models either
    ],
    ids=["500", "redirect", "huge", "nothing there"],
)
async def test_a_node_that_is_not_well_is_refused(settings: Settings, app: web.Application) -> None:
    """A redirect is never followed: it is the simplest way around an address check."""
    async with TestServer(app) as sick, serve(settings) as one:
        status, _, body = await one.call("POST", "/api/gpu/register", registration(str(sick.make_url("/"))))

        assert (status, body["error"]["code"]) == (422, "node_unhealthy")
        assert await shown(one) is None


async def test_a_node_that_is_not_there_is_refused(settings: Settings) -> None:
    async with serve(settings) as one:
        status, _, body = await one.call("POST", "/api/gpu/register", registration(f"http://127.0.0.1:{free_port()}"))

    assert (status, body["error"]["code"]) == (422, "node_unhealthy")


async def test_a_node_without_a_health_route_is_asked_for_its_models(settings: Settings) -> None:
    """Ollama is such a server."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "llama3:8b"}, {"id": "tiny"}, {"id": 5}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    async with (
        running(registry_consumer.service.run, settings),
        TestServer(app) as node,
        serve(settings) as one,
    ):
        status, _, body = await one.call("POST", "/api/gpu/register", registration(str(node.make_url("/v1/"))))

    assert (status, body["models"]) == (200, ["llama3:8b", "tiny"])


async def test_a_node_that_does_not_answer_is_refused_in_time(settings: Settings, node: FakeNode) -> None:
    node.knobs.health_ms = 5_000
    quick = settings.changed(node_health_timeout_ms=200)
    async with running(registry_consumer.service.run, quick), serve(quick) as one:
        status, _, body = await one.call("POST", "/api/gpu/register", registration(node.url))

    assert (status, body["error"]["code"]) == (422, "node_unhealthy")


async def test_without_the_health_check_a_node_behind_a_closed_door_is_accepted(settings: Settings) -> None:
    closed = settings.changed(node_health_check=False)
    async with running(registry_consumer.service.run, closed), serve(closed) as one:
        status, _, body = await one.call("POST", "/api/gpu/register", registration(f"http://127.0.0.1:{free_port()}"))

    assert (status, body["models"]) == (200, [settings.model])


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000", "http://localhost:8000", "http://169.254.169.254", "http://10.0.0.1", "http://[::1]:80"],
)
async def test_inner_addresses_are_refused_by_default(settings: Settings, url: str) -> None:
    async with serve(settings.changed(node_allow="")) as one:
        status, _, body = await one.call("POST", "/api/gpu/register", registration(url))

    assert (status, body["error"]["code"], body["error"]["field"]) == (403, "address_not_allowed", "api_url")


async def test_a_registry_that_is_away_is_504_and_what_it_finds_later_still_counts(
    settings: Settings, node: FakeNode
) -> None:
    slow = settings.changed(register_wait_ms=200)
    async with serve(slow) as one:
        status, headers, body = await one.call("POST", "/api/gpu/register", registration(node.url))
        assert (status, body["error"]["code"]) == (504, "registry_timeout")
        assert int(headers["Retry-After"]) >= 1

        async with running(registry_consumer.service.run, slow):

            async def is_shown() -> bool:
                return await shown(one) is not None

            await wait_until(is_shown)


async def test_a_lock_that_is_held_is_409_with_a_wait(pair: tuple[Served, Served], node: FakeNode) -> None:
    first, _ = pair
    cell = first.gateway.caller.cells[0]
    held = await cell.lock_node(NodeId("test-node"), 5_000)

    status, headers, body = await first.call("POST", "/api/gpu/register", registration(node.url))

    assert isinstance(held, LockTaken)
    assert (status, body["error"]["code"]) == (409, "registration_in_progress")
    assert 1 <= int(headers["Retry-After"]) <= 60
