"""Real gateways over a real server, with the other roles running in the same event loop."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest

import dispatcher.service
import gpu_worker.worker
import registry_consumer.service
from bus.api_keys import KeyLimits
from bus.link import ServerAddress
from bus.process.child import ParentLine
from bus.settings import Settings
from gateway.service import listen, open_gateway
from gateway.state import Gateway
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer

MODEL = "echo"
Role = Callable[[Settings, ParentLine], Awaitable[None]]


@dataclass
class Served:
    """One gateway that listens, and a client for it."""

    gateway: Gateway
    base: str
    http: aiohttp.ClientSession
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, Any]:
        """Status, headers and JSON of one call with the test's key (or with `headers` instead)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        async with self.http.request(
            method, self.base + path, data=data, headers=self.headers if headers is None else headers
        ) as response:
            text = await response.read()
            kind = response.headers.get("Content-Type", "")
            return (
                response.status,
                response.headers,
                orjson.loads(text) if kind.startswith("application/json") else text,
            )

    async def chat(self, content: str, **fields: Any) -> tuple[int, Any, Any]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.call("POST", "/v1/chat/completions", body)


def quick_settings(redis_url: str) -> Settings:
    """Short times, so that what waits for them in a test waits little."""
    return Settings().changed(
        redis_url=redis_url,
        model=MODEL,
        engine="echo",
        echo_models=MODEL,
        gateway_port=0,
        node_allow="*",
        lease_ms=1_500,
        renew_ms=300,
        self_fence_ms=1_000,
        node_ttl_ms=3_000,
        beat_ms=500,
        sweep_ms=100,
        block_ms=200,
        client_grace_ms=200,
        silence_ms=1_000,
        first_frame_wait_ms=300,
        drain_grace_ms=200,
        open_rate_per_minute=0,
    )


@pytest.fixture
def settings(server: ValkeyServer) -> Settings:
    return quick_settings(server.url)


@asynccontextmanager
async def serve(settings: Settings, scopes: tuple[str, ...] = ("chat", "node")) -> AsyncIterator[Served]:
    async with (
        open_gateway(settings, ServerAddress.parse(settings.redis_url)) as gateway,
        listen(gateway) as port,
        aiohttp.ClientSession() as http,
    ):
        made = await gateway.keys.create(scopes, user="tester", limits=KeyLimits())
        yield Served(gateway, f"http://127.0.0.1:{port}", http, made.key)


@asynccontextmanager
async def running(role: Role, settings: Settings) -> AsyncIterator[None]:
    """A role as a task, stopped in good order; its failure fails the test."""
    parent = ParentLine()
    task = asyncio.ensure_future(role(settings, parent))
    try:
        yield
    finally:
        parent.stop.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)


@pytest.fixture
async def served(settings: Settings) -> AsyncIterator[Served]:
    """One gateway, no node."""
    async with serve(settings) as one:
        yield one


async def until_ready(served: Served) -> None:
    async def is_ready() -> bool:
        return (await served.call("GET", "/ready"))[0] == 200

    await wait_until(is_ready, timeout_s=10)


@asynccontextmanager
async def whole_fleet(settings: Settings) -> AsyncIterator[tuple[Served, Served]]:
    """Two gateways, a registry consumer, a dispatcher and one echo worker."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(registry_consumer.service.run, settings))
        await stack.enter_async_context(running(dispatcher.service.run, settings))
        await stack.enter_async_context(running(gpu_worker.worker.run, settings.changed(node_id="echo-1")))
        first = await stack.enter_async_context(serve(settings))
        second = await stack.enter_async_context(serve(settings))
        second.key = first.key
        await until_ready(first)
        await until_ready(second)
        yield first, second
