"""A background step outlives the server's absence, and only that."""

import asyncio

import pytest

from bus.link import LinkClosed, LinkDown, ServerError
from bus.process.steady import keep_doing, pause


class Steps:
    """A step that fails as told, then stops the loop."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0
        self.stop = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        self.stop.set()


async def test_a_step_is_repeated_after_a_lost_link_and_a_refusal() -> None:
    step = Steps(LinkDown("gone", maybe_sent=True), ServerError("OOM", "command not allowed"))

    await asyncio.wait_for(keep_doing("test", step, step.stop), 5)

    assert step.calls == 3


async def test_a_closed_link_ends_the_loop() -> None:
    step = Steps(LinkClosed("closed"))

    await asyncio.wait_for(keep_doing("test", step, step.stop), 1)

    assert step.calls == 1


async def test_our_own_bug_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        await keep_doing("test", Steps(KeyError("bug")), asyncio.Event())


async def test_a_pause_ends_with_the_stop() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, stop.set)

    await asyncio.wait_for(pause(stop, 60), 1)
