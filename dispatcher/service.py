"""The dispatcher: queued jobs -> nodes' streams, by load score. Run as many as you like.

    wake  --read--> Wakes --which queues--> Passes: look, plan (pure), assign
    jobs  --group--> FrontDoor: admit | reject
    leases <--renew-- Share: who else lives, so that each queue has one owner
    sweep <--each sweep_ms, one dispatcher at a time (the script's lock)

One set of these per cell. None of them holds anything that another dispatcher could not do over: a killed one is
missed for as long as its parent takes to drop its lease, and its queues are served by the others within a second.
"""

import asyncio
import logging
import random
import secrets
from contextlib import AsyncExitStack

from bus.cell import Cell
from bus.codec.wire import SweepReport
from bus.ids import Holder
from bus.keys import CellKeys
from bus.link import Link, LinkError, Reader, ServerAddress
from bus.process.child import ParentLine
from bus.process.startup import prepare_server
from bus.process.steady import keep_doing, pause, until_done
from bus.settings import Settings
from dispatcher.front import FrontDoor
from dispatcher.passes import Passes
from dispatcher.sharing import HOLDER_PREFIX, Share
from dispatcher.wakes import Wakes

LEASES_AHEAD = 10  # nobody's lease lasts as long: what claims to is no dispatcher, and must not own queues for ever

log = logging.getLogger(__name__)


async def run(settings: Settings, parent: ParentLine) -> None:
    """All cells until the parent says stop; the pass in hand is finished first."""
    address = await prepare_server(settings)
    holder = Holder(f"{HOLDER_PREFIX}{secrets.token_hex(6)}")
    async with AsyncExitStack() as stack:
        dispatchers = [await _open(stack, address, number, holder, settings) for number in range(settings.cells)]
        parent.ready()
        async with asyncio.TaskGroup() as group:
            for number, dispatcher in enumerate(dispatchers):
                group.create_task(dispatcher.run(parent), name=f"dispatcher c{number}")


async def _open(
    stack: AsyncExitStack, address: ServerAddress, number: int, holder: Holder, settings: Settings
) -> "Dispatcher":
    name, any_key = f"dispatcher.c{number}", CellKeys(number).wake
    timeout_s, wait_s = settings.connect_timeout_ms / 1000, settings.send_wait_ms / 1000
    link = await Link.connect(address, name=name, cell_key=any_key, connect_timeout_s=timeout_s, wait_s=wait_s)
    await stack.enter_async_context(link)
    wakes = Reader(address, name=f"{name}.wake", cell_key=any_key, connect_timeout_s=timeout_s)
    jobs = Reader(address, name=f"{name}.jobs", cell_key=any_key, connect_timeout_s=timeout_s)
    await stack.enter_async_context(wakes)
    await stack.enter_async_context(jobs)
    return Dispatcher(Cell(link, number, settings), wakes, jobs, holder)


class Dispatcher:
    """One dispatcher on one cell."""

    def __init__(self, cell: Cell, wake_reader: Reader, jobs_reader: Reader, holder: Holder) -> None:
        self._cell = cell
        self._settings = cell.settings
        self._holder = holder
        self._wake_reader = wake_reader
        self._grace_ms = 0
        self.passes = Passes(cell, Share(holder), random.random)
        self._wakes = Wakes(cell, wake_reader, self.passes)
        self._door = FrontDoor(cell, jobs_reader, holder)

    async def run(self, parent: ParentLine) -> None:
        stop = parent.stop
        parent.lease(self._cell.cell, self._holder)  # told before it exists: a death in between must not leave it
        steps = {
            "wake": self._wakes.step,
            "pass": self.passes.step,
            "front door": self._door.step,
            "lease": lambda: self._renew(stop),
            "sweep": lambda: self._sweep(stop),
        }
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep_doing(what, step, stop), name=what) for what, step in steps.items()]
            await stop.wait()
            await until_done(tasks, self._unblock)
        await self._leave(parent)

    async def _renew(self, stop: asyncio.Event) -> None:
        """Renew the lease and see who else has one; another set of dispatchers means other queues."""
        settings, keys = self._settings, self._cell.keys
        expires_ms = await self._cell.lease(self._holder)
        now_ms, far_ms = expires_ms - settings.lease_ms, expires_ms + LEASES_AHEAD * settings.lease_ms
        live = await self._cell.link.send("ZRANGEBYSCORE", keys.leases, f"({now_ms}", far_ms)
        share = Share(self._holder, [raw.decode(errors="replace") for raw in live])
        if share.members != self.passes.share.members:
            log.info("dispatchers", extra={"cell": self._cell.cell, "me": self._holder, "members": len(share.members)})
            self.passes.share = share
        self.passes.look_again()  # also for what wakes did not say: the stream is short, and never silent under load
        await pause(stop, settings.renew_ms / 1000)

    async def _sweep(self, stop: asyncio.Event) -> None:
        report = await self._cell.sweep(self._holder)
        log_sweep(report)
        if report.grace_until_ms != self._grace_ms:
            self._grace_ms = report.grace_until_ms
            if self._grace_ms:
                why = "a new server, or many leases lapsed at once"
                log.info("sweep reclaims nothing for a while", extra={"until_ms": self._grace_ms, "why": why})
        await pause(stop, self._settings.sweep_ms / 1000)

    async def _unblock(self) -> None:
        """End the blocking reads, so that no entry is handed to a reader that is gone."""
        self.passes.close()
        await self._door.group.unblock()
        info = self._wake_reader.info
        if info is not None and self._wake_reader.connected:
            try:
                await self._cell.link.send("CLIENT", "UNBLOCK", info.client_id)
            except LinkError:
                log.debug("could not unblock a read: it ends by itself")

    async def _leave(self, parent: ParentLine) -> None:
        """The lease last: until here nobody else needed to take our queues over."""
        try:
            await self._door.group.leave()
            await self._cell.drop_lease(self._holder)
            parent.dropped(self._cell.cell, self._holder)
        except LinkError as error:
            log.warning("left without a word, the lease lapses", extra={"why": str(error)})


def log_sweep(report: SweepReport) -> None:
    for back in report.requeued:
        extra = {"job": back.job_id, "why": back.why, "due_ms": back.due_ms, "alone": back.alone}
        log.info("requeued", extra=extra)
    for end in report.ended:
        log.info("ended by the sweep", extra={"job": end.job_id, "state": end.state})
    for node in report.removed_nodes:
        why = "it said bye" if node in report.departed_nodes else "no beat for node_keep_ms"
        log.info("node forgotten", extra={"node": node, "why": why})
