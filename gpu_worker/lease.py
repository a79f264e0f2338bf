"""Leases, renewed from a thread of their own, so that neither a busy engine nor a busy service delays them.

What a node promises by its lease, and when it stops promising:

    engine idle, or made progress within stall_limit      renew every renew_ms
    engine busy without progress, or the service is deaf  no renewal: alive but deaf must lapse
    still so after another stall_limit                    the service ends, and its parent starts a new process
    this thread fails by a bug                            the process ends: nobody else could say that it is lost
    no successful renewal for self_fence_ms               fenced: publishes and finishes nothing (lease < self fence
                                                          would let another worker begin while this one still speaks)

The thread has its own event loop and its own links. It reads a node's held jobs (one atomic copy) and hands answers
to the service's loop; it shares nothing else. A success counts from before the call was sent.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from bus.cell import Cell
from bus.codec.wire import Renewed, Superseded
from bus.ids import Fence, Holder, JobId, NodeId
from bus.keys import CellKeys
from bus.link import Link, LinkError, ServerAddress
from bus.process.exits import EXIT_CRASH
from bus.settings import Settings
from gpu_worker.engine import EngineLoad

RETRIES_PER_PERIOD = 4  # after a failed renewal

log = logging.getLogger(__name__)


class StallWatch:
    """Whether an engine still gets on with its work. Progress counts from when it was last seen idle."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        self._limit_s = limit_s
        self._idle_s = now_s

    def is_stalled(self, load: EngineLoad, now_s: float) -> bool:
        if load.idle:
            self._idle_s = now_s
            return False
        return now_s - max(load.last_progress_s, self._idle_s) > self._limit_s


class LeaseClock:
    """When the holder must fall silent. Written by the lease thread, read by the service; a float is atomic."""

    def __init__(self, self_fence_s: float, now_s: float) -> None:
        self._self_fence_s = self_fence_s
        self.renewed_s = now_s

    def is_fenced(self, now_s: float) -> bool:
        return now_s - self.renewed_s > self._self_fence_s


class Tenure:
    """One node's ownership, as the lease thread needs to know it. Callbacks run on the service's event loop."""

    def __init__(
        self,
        cell: int,
        node: NodeId,
        holder: Holder,
        settings: Settings,
        *,
        listed: Callable[[], list[tuple[JobId, Fence]]],
        load: Callable[[], EngineLoad],
        deaf_s: Callable[[], float],
        on_renewed: Callable[[Renewed, float], None],
        on_superseded: Callable[[Superseded], None],
        on_stalled: Callable[[], None],
    ) -> None:
        """listed, load, deaf_s: called in the lease thread. deaf_s: for how long the service has heard nothing.

        on_renewed: the answer, and the monotonic time at which it was asked. on_stalled: end this node's service; its
        lease has lapsed and nothing suggests that its engine will ever go on.
        """
        now_s = time.monotonic()
        self.cell = cell
        self.node = node
        self.holder = holder
        self.clock = LeaseClock(settings.self_fence_ms / 1000, now_s)
        self.listed = listed
        self.on_renewed = on_renewed
        self.on_superseded = on_superseded
        self.on_stalled = on_stalled
        self.stalled_s: float | None = None  # since when no renewal is due
        self._load = load
        self._deaf_s = deaf_s
        self._stall_limit_s = settings.stall_limit_ms / 1000
        self._watch = StallWatch(self._stall_limit_s, now_s)

    def may_renew(self, now_s: float) -> bool:
        stalled = self._watch.is_stalled(self._load(), now_s) or self._deaf_s() > self._stall_limit_s
        if stalled and self.stalled_s is None:
            self.stalled_s = now_s
            log.error("no progress, the lease lapses", extra={"node": self.node})
        elif not stalled and self.stalled_s is not None:
            self.stalled_s = None
            log.warning("progress again", extra={"node": self.node})
        return not stalled

    def is_lost(self, now_s: float, patience: int = 1) -> bool:
        """Stalled for another `patience` limits: a new process is the only hope."""
        return self.stalled_s is not None and now_s - self.stalled_s > patience * self._stall_limit_s


class LeaseThread:
    """Renews any number of nodes of one process. `start` once, `close` last: a draining worker must not look dead."""

    def __init__(self, address: ServerAddress, settings: Settings, *, cells: Sequence[int], name: str) -> None:
        self._address = address
        self._settings = settings
        self._cells = tuple(cells)
        self._name = name
        self._tenures: dict[NodeId, Tenure] = {}
        self._bare: dict[int, Holder] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._now = asyncio.Event()
        self._stop = False
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"lease {name}", daemon=True)
        self._service_loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Raises LinkError if the server cannot be reached."""
        self._thread.start()
        await asyncio.shield(asyncio.wrap_future(self._started))

    def add(self, tenure: Tenure) -> None:
        """Renew this node from now on, first at once."""
        self._tenures[tenure.node] = tenure
        self._wake()

    def remove(self, node: NodeId) -> None:
        self._tenures.pop(node, None)

    def nudge(self) -> None:
        """Renew now: jobs were read, and the server should soon know that they have begun."""
        self._wake()

    def hold(self, cell: int, holder: Holder) -> None:
        """Keep a holder's own lease in a cell, also while it owns no node there (relays)."""
        self._bare[cell] = holder
        self._wake()

    async def close(self) -> None:
        self._stop = True
        self._wake()
        await asyncio.to_thread(self._thread.join, self._settings.connect_timeout_ms / 1000 + 1)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._now.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except LinkError as error:
            if not self._started.done():
                self._started.set_exception(error)
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            # The service would live on without a lease, take its jobs back in vain and never be told: a new process.
            log.critical("the lease thread crashed, ending the process", exc_info=error)
            os._exit(EXIT_CRASH)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        period_s = self._settings.renew_ms / 1000
        links = [await self._connect(cell, period_s) for cell in self._cells]
        cells = {cell: Cell(link, cell, self._settings) for cell, link in zip(self._cells, links, strict=True)}
        self._started.set_result(None)
        try:
            while not self._stop:
                self._now.clear()
                began_s = time.monotonic()
                ok = await self._renew_all(cells)
                rest_s = (period_s if ok else period_s / RETRIES_PER_PERIOD) - (time.monotonic() - began_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(rest_s, 0.01)):
                        await self._now.wait()
        finally:
            for link in links:
                await link.close()

    async def _connect(self, cell: int, period_s: float) -> Link:
        timeout_s = self._settings.connect_timeout_ms / 1000
        return await Link.connect(
            self._address,
            name=f"{self._name} lease",
            cell_key=CellKeys(cell).leases,
            connect_timeout_s=timeout_s,
            wait_s=period_s,
            reply_s=min(timeout_s, self._settings.self_fence_ms / 2000),
        )

    async def _renew_all(self, cells: dict[int, Cell]) -> bool:
        """All nodes in one write. False: some renewal failed and should be tried again soon."""
        now_s = time.monotonic()
        self._give_up_lost(now_s)
        due = [tenure for tenure in list(self._tenures.values()) if tenure.may_renew(now_s)]
        bare = [self._renew_bare(cells[cell], holder) for cell, holder in list(self._bare.items())]
        return all(await asyncio.gather(*bare, *(self._renew(cells[one.cell], one, now_s) for one in due)))

    def _give_up_lost(self, now_s: float) -> None:
        for tenure in list(self._tenures.values()):
            if tenure.is_lost(now_s, patience=2):  # it did not even hear that it is lost: its event loop is stuck
                log.critical("the service is stuck, ending the process", extra={"node": tenure.node})
                faulthandler.dump_traceback()
                os._exit(EXIT_CRASH)
            if tenure.is_lost(now_s):
                self._tell(tenure.on_stalled)

    async def _renew_bare(self, cell: Cell, holder: Holder) -> bool:
        try:
            await cell.lease(holder)
        except LinkError as error:
            log.warning("lease not renewed", extra={"holder": holder, "error": str(error)})
            return False
        return True

    async def _renew(self, cell: Cell, tenure: Tenure, asked_s: float) -> bool:
        try:
            renewed = await cell.renew(tenure.node, tenure.holder, tenure.listed())
        except Superseded as error:
            self._tenures.pop(tenure.node, None)
            self._tell(partial(tenure.on_superseded, error))
            return True
        except LinkError as error:
            log.warning("lease not renewed", extra={"node": tenure.node, "error": str(error)})
            return False
        tenure.clock.renewed_s = asked_s
        self._tell(partial(tenure.on_renewed, renewed, asked_s))
        return True

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            self._service_loop.call_soon_threadsafe(callback)
        except RuntimeError:
            log.debug("the service has ended")
