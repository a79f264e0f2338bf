"""The relay process: takes HTTP nodes by lease and serves each with a RelayEngine. `--engine relay` runs this.

    events --read--> look: nodes, leases --plan_watch--> take: adopt, engine, NodeService | leave
    lease thread: one lease a cell for the relay, and the reservations of every node

Any number of relays may run. A node that fails, is superseded or misbehaves ends its own service and nothing else.
"""

import asyncio
import contextlib
import logging
import time
from contextlib import AsyncExitStack

import aiohttp

from bus.address_guard import AddressPolicy, AllowError, guarded_session
from bus.cell import Cell
from bus.codec.wire import Owned, Superseded
from bus.ids import Holder, NodeId
from bus.link import LinkError, Reader, ServerAddress
from bus.process.child import ParentLine
from bus.process.exits import StartError, leaves
from bus.process.startup import prepare_server
from bus.process.steady import keep_doing, pause
from bus.settings import Settings
from gpu_worker.lease import LeaseThread
from gpu_worker.reader import NodeReader
from gpu_worker.relay_engine.call import RelayLimits
from gpu_worker.relay_engine.engine import RelayEngine, RelayNode
from gpu_worker.relay_engine.watch import HOLDER_PREFIX, Serving, Unowned, plan_watch, relays_of
from gpu_worker.service import NodeGone, NodeService
from gpu_worker.worker import connected_cell

LOOK_MS_MAX = 1_000  # longest time between two looks at the nodes
LOOK_PAUSE_S = 0.05  # shortest
RETAKE_S = 1.0  # after a node's service failed

log = logging.getLogger(__name__)


async def run(settings: Settings, parent: ParentLine) -> None:
    """All cells until the parent says stop. See bus.process.child.ChildMain."""
    try:
        policy = AddressPolicy.parse(settings.node_allow)
    except AllowError as error:
        raise StartError(str(error)) from error
    address = await prepare_server(settings)
    holder = Holder(f"{HOLDER_PREFIX}{settings.node_id}.{time.time_ns() // 1_000_000}")
    cells = range(settings.cells)
    async with AsyncExitStack() as stack:
        # No bound on connections here: the nodes' capacities are the bound, and one node must not starve another.
        session = await stack.enter_async_context(guarded_session(policy, connections_max=0))
        lease = LeaseThread(address, settings, cells=cells, name=settings.node_id)
        await lease.start()
        stack.push_async_callback(lease.close)
        relays = []
        for number in cells:
            cell = await stack.enter_async_context(connected_cell(settings, address, number, settings.node_id))
            relays.append(CellRelay(cell, address, holder, session, lease, parent))
        async with asyncio.TaskGroup() as group:
            for relay in relays:
                group.create_task(relay.run(), name=f"relay c{relay.cell.cell}")
            log.info("relay is up", extra={"relay": holder, "cells": len(relays)})
            parent.ready()


class _Service:
    """One node in service."""

    def __init__(self, node: RelayNode, task: asyncio.Task[None]) -> None:
        self.node = node
        self.task = task
        self.stop = asyncio.Event()
        self.service: NodeService | None = None

    def to_serving(self) -> Serving:
        return Serving(self.node, self.service is not None and self.service.draining.is_set())


class CellRelay:
    """The nodes of one cell that this relay serves."""

    def __init__(
        self,
        cell: Cell,
        address: ServerAddress,
        holder: Holder,
        session: aiohttp.ClientSession,
        lease: LeaseThread,
        parent: ParentLine,
    ) -> None:
        self.cell = cell
        self._settings = cell.settings
        self._holder = holder
        self._session = session
        self._lease = lease
        self._parent = parent
        name = f"{cell.settings.node_id} c{cell.cell}"
        self._reader = NodeReader(cell, address, holder, block_ms=cell.settings.block_ms, name=name, forgets=True)
        self._events = Reader(address, name=f"{name} events", cell_key=cell.keys.leases)
        self._events_id = "$"  # what happened before the first look is seen by it
        self._services: dict[NodeId, _Service] = {}
        self._not_before: dict[NodeId, float] = {}
        self._unowned = Unowned()
        self._look_now = asyncio.Event()

    async def run(self) -> None:
        stop = self._parent.stop
        self._parent.lease(self.cell.cell, self._holder)  # told before it exists: a death in between must not leave it
        await self.cell.lease(self._holder)
        self._lease.hold(self.cell.cell, self._holder)
        self.cell.link.on_reconnect(self._on_reconnect)
        async with self._events, asyncio.TaskGroup() as group:
            reading = group.create_task(self._reader.run(), name="reads")
            hearing = group.create_task(keep_doing("events", self._hear, stop), name="events")
            await keep_doing("look", lambda: self._look(group), stop)
            await self._stop_all()
            reading.cancel()
            hearing.cancel()
        await self._give_up()

    async def _hear(self) -> None:
        """Something happened to a node: look at once."""
        key = self.cell.keys.events
        for _, entries in await self._events.xread({key: self._events_id}, count=100, block_ms=self._settings.block_ms):
            self._events_id = entries[-1][0]
            self._look_now.set()

    async def _look(self, group: asyncio.TaskGroup) -> None:
        self._look_now.clear()
        now_s = time.monotonic()
        views = await self.cell.nodes()
        relays = relays_of(await self._holders(), self._holder)
        served = {node: one.to_serving() for node, one in self._services.items()}
        plan = plan_watch(self._holder, relays, views, served, self._unowned.see(views, now_s))
        for node in plan.leave:
            self._services[node].stop.set()
        for relay_node in plan.take:
            if self._not_before.get(relay_node.id, 0.0) <= now_s:
                await self._take(relay_node, group)
        self._not_before = {node: until for node, until in self._not_before.items() if until > now_s}
        await pause(self._parent.stop, LOOK_PAUSE_S)
        longest_s = min(LOOK_MS_MAX, self._settings.renew_ms) / 1000
        stopping = asyncio.ensure_future(self._parent.stop.wait())
        hearing = asyncio.ensure_future(self._look_now.wait())
        await asyncio.wait({stopping, hearing}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        hearing.cancel()

    async def _holders(self) -> list[str]:
        """Who has a lease, by the server's clock as near as it matters: a wrong guess is harmless."""
        seconds, _ = await self.cell.link.send("TIME")
        raw = await self.cell.link.send("ZRANGEBYSCORE", self.cell.keys.leases, int(seconds) * 1000, "+inf")
        return [one.decode(errors="replace") for one in raw]

    async def _take(self, node: RelayNode, group: asyncio.TaskGroup) -> None:
        owned = await self.cell.adopt(node.id, self._holder)
        if not isinstance(owned, Owned):
            return  # another relay was faster, or its old owner's lease still holds
        self._parent.owns(self.cell.cell, node.id, self._holder)
        seconds, micros = await self.cell.link.send("TIME")
        since_ms = int(seconds) * 1000 + int(micros) // 1000
        log.info("node taken", extra={"node": node.id, "api_url": node.api_url, "capacity": node.capacity})
        task = group.create_task(self._serve(node, since_ms), name=f"relay of {node.id}")
        self._services[node.id] = _Service(node, task)

    async def _serve(self, node: RelayNode, since_ms: int) -> None:
        """One node until it is left, superseded, or its service fails; never ends the relay."""
        one = self._services[node.id]
        engine = RelayEngine(node, self._session, RelayLimits.from_settings(self._settings))
        try:
            await engine.start()
            one.service = NodeService(
                self.cell,
                node.id,
                self._holder,
                engine,
                self._settings,
                reader=self._reader,
                lease=self._lease,
                since_ms=since_ms,
                resumes=False,
            )
            await one.service.run(one.stop)
            log.info("node left", extra={"node": node.id})
        except Exception as error:
            found = leaves(error)
            if any(isinstance(leaf, NodeGone) for leaf in found):
                log.info("node is gone", extra={"node": node.id})
            elif any(isinstance(leaf, Superseded) for leaf in found):
                log.warning("node taken by another owner", extra={"node": node.id, "reason": str(found[0])})
            elif all(isinstance(leaf, LinkError) for leaf in found):
                log.warning("node's service lost the server", extra={"node": node.id, "reason": str(found[0])})
            else:
                log.exception("node's service failed", extra={"node": node.id})
            self._not_before[node.id] = time.monotonic() + RETAKE_S
        finally:
            del self._services[node.id]
            await engine.close()
            self._parent.left(self.cell.cell, node.id, self._holder)
            self._look_now.set()

    def _on_reconnect(self) -> None:
        for one in self._services.values():
            if one.service is not None:
                one.service.on_reconnect()
        self._look_now.set()

    async def _stop_all(self) -> None:
        """Every node hands back what it cannot finish in time; the lease holds until they have."""
        tasks = [one.task for one in self._services.values()]
        for one in self._services.values():
            one.stop.set()
        if tasks:
            await asyncio.wait(tasks)

    async def _give_up(self) -> None:
        """The lease goes, and with it whatever was assigned at the last moment."""
        with contextlib.suppress(LinkError):  # then it lapses
            await self.cell.down(None, self._holder)
        self._parent.dropped(self.cell.cell, self._holder)
