"""The link alone: CPU per script call of `bus.link.Link` beside redis-py, on one core's worth of callers.

    .venv/bin/python -m benchmarks.link

It is why the link parses replies itself (bus/link/wire.py): redis-py's connection awaits each reply in turn.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import uvloop

from bus.link import Link, Script, ServerAddress, client
from bus.link.dial import connection_to, open_connection
from tests.harness.servers import ValkeyServer

SCRIPT = Script("hset", "redis.call('HSET', KEYS[1], 'f', ARGV[1]) return {1, 'ok'}")
KEYS = ["{c0}:x"]
ARGS: list[str | bytes | int] = [b"x" * 100, 1, 2, 3, 4, 5]
CALLS = 20_000
BATCH = 32


async def timed(name: str, in_flight: int, calls: int, run: Callable[[], Awaitable[object]]) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    await run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"{name:34} {in_flight:9} {calls / wall:10.0f} {1e6 * cpu / calls:14.1f}", flush=True)


async def with_link(address: ServerAddress, in_flight: int, calls: int) -> None:
    async with await Link.connect(address, name="bench") as link:
        await link.script(SCRIPT, KEYS, ARGS)

        async def caller() -> None:
            for _ in range(calls // in_flight):
                await link.script(SCRIPT, KEYS, ARGS)

        async def run() -> None:
            await asyncio.gather(*(caller() for _ in range(in_flight)))

        await timed("bus.link", in_flight, calls, run)


async def with_client(address: ServerAddress, in_flight: int, calls: int) -> None:
    """redis-py as one would use it: a pool, one connection for each call in flight."""
    async with client(address, connections_max=in_flight + 1) as redis:
        await redis.eval(SCRIPT.source, 1, *KEYS, *ARGS)

        async def caller() -> None:
            for _ in range(calls // in_flight):
                await redis.evalsha(SCRIPT.sha, 1, *KEYS, *ARGS)

        async def run() -> None:
            await asyncio.gather(*(caller() for _ in range(in_flight)))

        await timed("redis-py client", in_flight, calls, run)


async def with_connection(address: ServerAddress, calls: int) -> None:
    """redis-py's connection, pipelined by hand: what a link on top of its read_response could reach at best."""
    connection = connection_to(address, address.endpoints[0], name="bench", timeout_s=5)
    await open_connection(connection)
    command = ("EVALSHA", SCRIPT.sha, 1, *KEYS, *ARGS)

    async def run() -> None:
        for _ in range(calls // BATCH):
            await connection.send_packed_command(connection.pack_commands([command] * BATCH))
            for _ in range(BATCH):
                await connection.read_response()

    await timed("redis-py connection, by hand", BATCH, calls, run)
    await connection.disconnect()


async def main() -> None:
    print(f"{'':34} {'in flight':>9} {'calls/s':>10} {'client us/call':>14}")
    with ValkeyServer() as server:
        address = ServerAddress.parse(server.url)
        for in_flight in (1, 32, 256):
            calls = CALLS if in_flight > 1 else CALLS // 4
            await with_link(address, in_flight, calls)
            await with_client(address, in_flight, calls)
        await with_connection(address, CALLS)


if __name__ == "__main__":
    uvloop.run(main())
