"""Waiting for a condition with a deadline; for tests, and for benchmarks, which run where pytest is not installed."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def wait_until(
    condition: Callable[[], object | Awaitable[object]], timeout_s: float = 5.0, step_s: float = 0.01
) -> None:
    """Wait for a condition (a plain or async callable), looking every step_s. Raises AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        outcome = condition()
        if inspect.isawaitable(outcome):
            outcome = await outcome
        if outcome:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout_s:g} s: {_describe(condition)}")
        await asyncio.sleep(step_s)


def _describe(condition: object) -> str:
    try:
        return inspect.getsource(condition).strip()  # type: ignore[arg-type]  # a partial has no source
    except TypeError:
        return repr(condition)
