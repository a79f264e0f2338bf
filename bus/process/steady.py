"""Loops of a service that outlive the server's absence: what every background step does when a call fails.

A lost link or a busy one is the world's doing: the step is repeated after a pause, with the cause in the log when it
begins and when it ends. An error that the server answers (OOM, WRONGTYPE on a foreign key) is logged each time and
repeated more slowly: a person may mend it while the service runs. Anything else is our bug and ends the process.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable

from bus.link import LinkBusy, LinkClosed, LinkDown, ServerError

LINK_PAUSE_S = 0.2
SERVER_PAUSE_S = 1.0
UNBLOCK_EVERY_S = 0.1

log = logging.getLogger(__name__)


async def keep_doing(what: str, step: Callable[[], Awaitable[object]], stop: asyncio.Event) -> None:
    """Repeat `step` until `stop`; the step itself waits for its work, with a bound. Returns when the link is closed."""
    down = False
    while not stop.is_set():
        try:
            await step()
        except LinkClosed:
            return
        except (LinkDown, LinkBusy) as error:
            if not down:
                log.warning("waits for the server", extra={"step": what, "why": str(error)})
            down = True
            await pause(stop, LINK_PAUSE_S)
        except ServerError as error:
            log.error("the server refuses", extra={"step": what, "code": error.code, "why": error.message})
            await pause(stop, SERVER_PAUSE_S)
        else:
            if down:
                log.info("goes on", extra={"step": what})
            down = False


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but not beyond the stop."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


async def until_done(tasks: Iterable[asyncio.Task[None]], unblock: Callable[[], Awaitable[None]]) -> None:
    """Wait for steps that have been told to stop; `unblock` ends their blocking reads, again for one that just began.

    Waits for each read's own bound at most. Failures of the tasks are their group's to raise.
    """
    left = set(tasks)
    while left:
        await unblock()
        _, left = await asyncio.wait(left, timeout=UNBLOCK_EVERY_S)
