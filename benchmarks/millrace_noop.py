"""Millrace's client side of benchmarks/bus.py: one-token chats on the echo engine, result awaited."""

import asyncio
import os
from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.closed_loop import serve
from bus.calls.client import ChatError
from millrace import Client

START_S = 30.0


async def first_answer(call: Callable[[int], Awaitable[object]]) -> None:
    """The worker has just been started: until it is registered, jobs are refused."""
    async with asyncio.timeout(START_S):
        while True:
            try:
                await call(0)
                return
            except ChatError as error:
                if error.code not in {"no_model", "no_node"}:
                    raise
                await asyncio.sleep(0.1)


async def main() -> None:
    async with Client(os.environ["REDIS_URL"], model="echo") as client:

        async def call(number: int) -> object:
            return await client.chat("ok", max_tokens=1)

        await first_answer(call)
        await serve(call)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main())
