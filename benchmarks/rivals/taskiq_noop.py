# mypy: ignore-errors
"""taskiq-redis on streams: `taskiq worker taskiq_noop:broker` is the worker, `python taskiq_noop.py` the client."""

import asyncio
import os

import uvloop
from closed_loop import serve
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ["REDIS_URL"]
broker = RedisStreamBroker(URL, xread_count=32).with_result_backend(RedisAsyncResultBackend(URL, result_ex_time=60))


@broker.task(task_name="noop")
async def noop(number: int) -> int:
    return number


async def main():
    await broker.startup()

    async def call(number):
        task = await noop.kiq(number)
        return await task.wait_result(check_interval=0.005, timeout=30)  # default 0.2 s

    await call(0)
    await serve(call)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main())
