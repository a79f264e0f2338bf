"""Time to first byte through the gateway, beside the same jobs over the bus without one.

    python -m benchmarks.gateway [--requests 200] [--in-flight 1 16 64]

Starts an own server, registry consumer, dispatcher, echo worker and gateway, all as processes. The client streams
`/v1/chat/completions` over kept-alive connections; the first byte is the first byte of the response's body.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.echo_fleet import MODEL, EchoFleet, running_echo_fleet
from millrace import Client

PROMPT = "[[tokens=8]] a few words to answer with"


async def over_http(fleet: EchoFleet, session: aiohttp.ClientSession) -> float:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    started = time.perf_counter()
    async with session.post(f"{fleet.gateway_url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        await response.content.readany()
        first = time.perf_counter() - started
        await response.read()
    return first


async def over_the_bus(client: Client) -> float:
    started = time.perf_counter()
    first = 0.0
    async for _ in client.stream(PROMPT, model=MODEL):
        first = first or time.perf_counter() - started
    return first


async def measure(one: Callable[[], Awaitable[float]], requests: int, in_flight: int) -> list[float]:
    """Closed loop: `in_flight` clients, each asks again as soon as its answer has ended."""
    left = iter(range(requests))
    times: list[float] = []

    async def client() -> None:
        for _ in left:
            times.append(await one())

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(client())
    return times


def show(name: str, in_flight: int, times: list[float], wall_s: float) -> None:
    cuts = statistics.quantiles(times, n=100)
    figures = f"p50 {cuts[49] * 1000:7.2f} ms   p99 {cuts[98] * 1000:7.2f} ms   {len(times) / wall_s:7.0f} requests/s"
    print(f"{name:<10} {in_flight:>4} in flight   first byte {figures}", flush=True)


async def run(requests: int, levels: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with running_echo_fleet(Path(folder), gateway=True) as fleet:
            headers = {"Authorization": f"Bearer {fleet.api_key}"}
            connector = aiohttp.TCPConnector(limit=0)
            async with (
                aiohttp.ClientSession(headers=headers, connector=connector) as session,
                Client(fleet.redis_url) as client,
            ):
                ways: dict[str, Callable[[], Awaitable[float]]] = {
                    "gateway": lambda: over_http(fleet, session),
                    "bus alone": lambda: over_the_bus(client),
                }
                for in_flight in levels:
                    for name, one in ways.items():
                        await measure(one, min(requests, 4 * in_flight), in_flight)
                        started = time.perf_counter()
                        times = await measure(one, requests * max(1, in_flight // 4), in_flight)
                        show(name, in_flight, times, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="at one in flight; more at higher levels")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16, 64])
    flags = parser.parse_args()
    uvloop.run(run(flags.requests, flags.in_flight))


if __name__ == "__main__":
    main()
