# mypy: ignore-errors
"""arq: `arq arq_noop.WorkerSettings` is the worker, `python arq_noop.py` the client. Needs REDIS_URL."""

import asyncio
import os

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from closed_loop import serve

SETTINGS = RedisSettings.from_dsn(os.environ["REDIS_URL"])


async def noop(ctx, number):
    return number


class WorkerSettings:
    functions = [noop]  # noqa: RUF012
    redis_settings = SETTINGS
    max_jobs = 32
    poll_delay = 0.01  # default 0.5 s: with it nobody would wait for a result
    keep_result = 60


async def main():
    pool = await create_pool(SETTINGS)

    async def call(number):
        job = await pool.enqueue_job("noop", number)
        return await job.result(timeout=30, poll_delay=0.01)  # default 0.5 s

    await call(0)
    await serve(call)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main())
