"""The wake stream: what dispatchers block on. Many entries make one pass.

Read from the last id, never `$`: what is added between two reads is not missed. What the stream does not say (trimmed,
lost with a server, before our start) is found by looking at everything: at boot, at each BLOCK timeout and reconnect.
"""

import asyncio
import logging

from bus.cell import Cell
from bus.codec.entries import parse_wake
from bus.codec.events import ForeignEntry
from bus.link import Entry, Reader
from dispatcher.board import order_of
from dispatcher.passes import Passes

COUNT = 1_000

log = logging.getLogger(__name__)


class Wakes:
    """Reads one cell's `wake` and tells the passes which queues to look at."""

    def __init__(self, cell: Cell, reader: Reader, passes: Passes) -> None:
        self._cell = cell
        self._reader = reader
        self._passes = passes
        self._key = cell.keys.wake
        self._last_id = ""
        self._generation = 0

    async def step(self) -> None:
        """One read, at most BLOCK long."""
        if self._reader.generation != self._generation or not self._last_id:
            self._generation = self._reader.generation
            self._last_id = await self._start_id()
            self._passes.start_over()
        batch = await self._reader.xread({self._key: self._last_id}, count=COUNT, block_ms=self._cell.settings.block_ms)
        if not batch:
            self._passes.look_again()
        for _, entries in batch:
            self._last_id = entries[-1][0]
            for entry in entries:
                await self._tell(entry)
        # Two turns of the loop, so that the pass' assign is on its way before the next read costs us a system call.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _start_id(self) -> str:
        """Where to go on: at the newest entry, or where we were, unless the server lost its last second."""
        newest = await self._cell.link.send("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        newest_id = newest[0][0].decode() if newest else "0-0"
        return newest_id if not self._last_id else min(self._last_id, newest_id, key=order_of)

    async def _tell(self, entry: Entry) -> None:
        entry_id, fields = entry
        try:
            wake = parse_wake(fields)
        except ForeignEntry as reason:
            log.warning("dead letter", extra={"stream": "wake", "entry": entry_id, "why": str(reason)})
            await self._cell.dead_letter(self._key, entry_id, str(reason), fields)
            return
        if wake.queue:
            self._passes.wake(wake.queue, wake.head)
        else:
            self._passes.wake_room()
