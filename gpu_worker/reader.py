"""Blocking reads for all nodes of one process in one cell: two connections, however many nodes.

    jobs      XREADGROUP of node:<id>:jobs, only of nodes that have room, and only as many entries as they have room
    control   XREAD of node:<id>:control, from the time the node was taken over

After each (re)connect, and for a node that was just added, a consumer's own pending entries come first ("0"): what
the server handed out with a reply that was lost is there, and nowhere else. A node without room is left out of the
read; when it has room again, or a node is added, the blocked read is ended early with CLIENT UNBLOCK.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from bus.cell import Cell
from bus.ids import Holder, NodeId
from bus.keys import WORKERS_GROUP
from bus.link import Batch, Entry, LinkError, Reader, ServerAddress, ServerError

READ_MAX = 512  # entries of one stream in one read
# Turns of the loop after a delivery: what an instant engine answers is written before the next read is.
TURNS_FIRST = 5
PAUSE_S = 0.3  # after an error reply, so that a foreign key under our name makes no hot loop

log = logging.getLogger(__name__)


class NodeInbox(Protocol):
    """What a node's service offers its reader."""

    def room(self) -> int:
        """How many more jobs it would take now."""
        ...

    async def take_jobs(self, entries: Sequence[Entry]) -> None: ...

    async def take_control(self, entries: Sequence[Entry]) -> None: ...

    def on_gone(self) -> None:
        """The server does not know the node any more; asked for only where the reader was told to notice."""
        ...


class _Served:
    __slots__ = ("control_id", "control_start", "inbox", "pending", "waits_for_room")

    def __init__(self, inbox: NodeInbox, control_id: str) -> None:
        self.inbox = inbox
        self.control_id = self.control_start = control_id
        self.pending: str | None = "0"  # own pending entries are still to be read from here; None: they are done
        self.waits_for_room = False


class NodeReader:
    """One consumer (the holder) on the streams of its nodes. `run` is one task; the rest may be called meanwhile."""

    def __init__(
        self,
        cell: Cell,
        address: ServerAddress,
        consumer: Holder,
        *,
        block_ms: int,
        name: str,
        forgets: bool = False,
    ) -> None:
        """forgets: a node may be removed under us (HTTP nodes come back by registration only). Its stream is then not
        made again, where nobody would ever delete it, but its inbox is told. A worker's own node it makes again."""
        cell_key = cell.keys.leases
        self._cell = cell
        self._consumer = consumer
        self._block_ms = block_ms
        self._may_make = self._is_known if forgets else None
        self._jobs = Reader(address, name=f"{name} jobs", cell_key=cell_key)
        self._control = Reader(address, name=f"{name} control", cell_key=cell_key)
        self._served: dict[NodeId, _Served] = {}
        self._by_key: dict[str, _Served] = {}
        self._changed = {name: asyncio.Event() for name in ("jobs", "control")}
        self._jobs_generation = 0
        self._control_run_id = ""
        self._heard_s = time.monotonic()

    async def make_group(self, node: NodeId) -> None:
        """Make the node's stream and group, so that its first read need not find out that they are missing."""
        key = self._cell.keys.node_jobs(node)
        with contextlib.suppress(LinkError):  # BUSYGROUP: it exists; anything else, the read deals with
            await self._cell.link.send("XGROUP", "CREATE", key, WORKERS_GROUP, "0", "MKSTREAM")

    def add(self, node: NodeId, inbox: NodeInbox, *, since_ms: int) -> None:
        """Read a node from now on. Control entries older than since_ms (server time) were for an earlier owner."""
        served = _Served(inbox, f"{since_ms}-0")
        self._served[node] = served
        self._by_key[self._cell.keys.node_jobs(node)] = served
        self._by_key[self._cell.keys.node_control(node)] = served
        self._interrupt()

    def remove(self, node: NodeId) -> None:
        """Take no more of its entries."""
        self._served.pop(node, None)
        self._by_key.pop(self._cell.keys.node_jobs(node), None)
        self._by_key.pop(self._cell.keys.node_control(node), None)

    def room_came(self, node: NodeId) -> None:
        """The node has room again; cheap when nothing waited for it."""
        served = self._served.get(node)
        if served is not None and served.waits_for_room:
            served.waits_for_room = False
            self._interrupt()

    def deaf_s(self) -> float:
        """For how long reads of jobs went unanswered while the cell's link says that the server is there."""
        return time.monotonic() - self._heard_s if self._cell.link.connected else 0.0

    async def run(self) -> None:
        """Until cancelled. Raises nothing that a server or a foreign entry can cause."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_forever(self._read_jobs), name="read jobs")
                group.create_task(self._read_forever(self._read_control), name="read control")
        finally:
            await self._jobs.close()
            await self._control.close()

    async def _read_forever(self, read_once: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await read_once()
            except (ServerError, LinkError) as error:
                log.warning("read refused", extra={"consumer": self._consumer, "error": str(error)})
                await asyncio.sleep(PAUSE_S)

    async def _read_jobs(self) -> None:
        self._look_for_lost_replies(answered=())
        pending = {
            self._cell.keys.node_jobs(node): served.pending
            for node, served in self._served.items()
            if served.pending is not None
        }
        if pending:
            await self._read_pending(pending)
            return
        self._changed["jobs"].clear()
        ready, room = self._ready()
        if not ready:
            await self._wait_for_change("jobs")
            self._heard_s = time.monotonic()  # nothing was asked
            return
        batch = await self._group_read(dict.fromkeys(ready, ">"), room, self._block_ms)
        await self._deliver(batch)
        if batch:
            for _ in range(TURNS_FIRST):
                await asyncio.sleep(0)

    def _look_for_lost_replies(self, answered: Collection[str]) -> None:
        """After a (re)connect all nodes read their own pending entries, but for those that just did."""
        if self._jobs.generation != self._jobs_generation:
            self._jobs_generation = self._jobs.generation
            for node, served in self._served.items():
                if self._cell.keys.node_jobs(node) not in answered:
                    served.pending = "0"

    async def _read_pending(self, streams: dict[str, str]) -> None:
        batch = await self._group_read(streams, READ_MAX, 1)
        if not self._jobs.connected:
            return  # no answer: the next read asks again
        self._look_for_lost_replies(answered=streams)
        found = dict(batch)
        for key in streams:
            served = self._by_key.get(key)
            if served is not None:
                entries = found.get(key)
                served.pending = entries[-1][0] if entries else None
        await self._deliver(batch)

    async def _group_read(self, streams: dict[str, str], count: int, block_ms: int) -> Batch:
        batch = await self._jobs.xreadgroup(
            WORKERS_GROUP, self._consumer, streams, count=count, block_ms=block_ms, may_make=self._may_make
        )
        if self._jobs.connected:
            self._heard_s = time.monotonic()
        return batch

    async def _is_known(self, key: str) -> bool:
        """Whether the node of this stream still exists."""
        node = next((node for node in self._served if self._cell.keys.node_jobs(node) == key), None)
        if node is None:
            return False  # left meanwhile
        if await self._cell.link.send("EXISTS", self._cell.keys.node(node)):
            return True
        self._served[node].inbox.on_gone()
        self.remove(node)
        return False

    def _ready(self) -> tuple[list[str], int]:
        """The streams of nodes with room, and the largest room among them."""
        ready: list[str] = []
        largest = 0
        for node, served in self._served.items():
            room = served.inbox.room()
            served.waits_for_room = room <= 0
            if room > 0:
                ready.append(self._cell.keys.node_jobs(node))
                largest = max(largest, room)
        return ready, min(largest, READ_MAX)

    async def _deliver(self, batch: Batch) -> None:
        for key, entries in batch:
            served = self._by_key.get(key)
            gone = [entry_id for entry_id, fields in entries if not fields]
            if gone:  # pending under our name, but deleted: its job was taken from us
                await self._cell.link.send("XACK", key, WORKERS_GROUP, *gone)
            present = [entry for entry in entries if entry[1]]
            if served is not None and present:
                await served.inbox.take_jobs(present)

    async def _read_control(self) -> None:
        self._changed["control"].clear()
        streams = {self._cell.keys.node_control(node): served.control_id for node, served in self._served.items()}
        if not streams:
            await self._wait_for_change("control")
            return
        batch = await self._control.xread(streams, count=READ_MAX, block_ms=self._block_ms)
        if self._control.run_id != self._control_run_id:
            if self._control_run_id:  # another server, or one that lost its last second: its ids may be below ours
                for each in self._served.values():
                    each.control_id = each.control_start
            self._control_run_id = self._control.run_id
        for key, entries in batch:
            served = self._by_key.get(key)
            if served is not None:
                served.control_id = entries[-1][0]
                await served.inbox.take_control(entries)

    async def _wait_for_change(self, which: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._block_ms / 1000):
                await self._changed[which].wait()

    def _interrupt(self) -> None:
        """End blocked reads, so that the next ones name the right streams."""
        for changed in self._changed.values():
            changed.set()
        for reader in (self._jobs, self._control):
            if reader.connected and reader.info is not None and self._cell.link.connected:
                future = self._cell.link.send("CLIENT", "UNBLOCK", reader.info.client_id)
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
