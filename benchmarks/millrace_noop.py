"""Millrace's client side of benchmarks/bus.py: one-token chats on the echo engine, result awaited."""

import asyncio
import os

import uvloop

from benchmarks.closed_loop import serve
from millrace import Client


async def main() -> None:
    async with Client(os.environ["REDIS_URL"], model="echo") as client:

        async def call(number: int) -> object:
            return await client.chat("ok", max_tokens=1)

        await call(0)
        await serve(call)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main())
