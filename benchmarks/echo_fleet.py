"""An own server and a fleet of echo workers for benchmarks: every role a process, default settings bar the model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from tests.harness.fleet import Fleet, RoleProcess
from tests.harness.servers import ValkeyServer, free_port
from tests.harness.waiting import wait_until

MODEL = "echo"
START_S = 30.0


@dataclass(frozen=True)
class EchoFleet:
    redis_url: str
    server: ValkeyServer
    workers: tuple[RoleProcess, ...]
    gateway_url: str = ""
    api_key: str = ""


@asynccontextmanager
async def running_echo_fleet(
    folder: Path, *, workers: int = 1, capacity: int = 512, gateway: bool = False
) -> AsyncIterator[EchoFleet]:
    """AOF everysec, as `millrace up` runs it. Raises AssertionError if it is not ready in 30 s, and says why."""
    with ValkeyServer(aof="everysec") as server, Fleet(server.url, folder) as fleet:
        fleet.settings = {"model": MODEL, "log_level": "warning", "open_rate_per_minute": 0}
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        started = tuple(
            fleet.start("gpu_worker", "--engine", "echo", node_id=f"echo-{number}", capacity=capacity)
            for number in range(1, workers + 1)
        )
        url = key = ""
        if gateway:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            fleet.start("gateway", "--port", str(port))
            async with client(ServerAddress.parse(server.url)) as redis:
                key = (await ApiKeys(redis).create(["chat"])).key
        await _wait_for_nodes(server, workers)
        if gateway:
            await _wait_for_ready(url)
        yield EchoFleet(server.url, server, started, url, key)


async def _wait_for_nodes(server: ValkeyServer, wanted: int) -> None:
    async with client(ServerAddress.parse(server.url)) as redis:

        async def all_alive() -> bool:
            return len([key async for key in redis.scan_iter(match="millrace:{c0}:node:*:alive")]) >= wanted

        await wait_until(all_alive, timeout_s=START_S)


async def _wait_for_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:

        async def ready() -> bool:
            try:
                async with session.get(f"{url}/ready") as response:
                    return response.status == 200
            except aiohttp.ClientConnectionError:
                return False

        await wait_until(ready, timeout_s=START_S)
