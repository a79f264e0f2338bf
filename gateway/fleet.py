"""The fleet's nodes as the server has them now: one read at a time, shared by all who wait for it.

A status call must show what was true after it came in, so it never joins a read that is already under way: it waits
for the next one. Readiness and the list of models accept a view of up to `age_max_s`.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from bus.cell import Cell
from bus.codec.wire import NodeView
from gateway.nodes_wire import newest_of_each

READ_WAIT_S: Final = 3.0


class Fleet:
    """nodes: one view a node id. now_ms: the server's clock at the read."""

    def __init__(self, nodes: list[NodeView], now_ms: int, read_at_s: float) -> None:
        self.nodes = nodes
        self.now_ms = now_ms
        self.read_at_s = read_at_s


def heard(task: asyncio.Task[Fleet]) -> None:
    """A failed read whose askers have all gone away is nobody's surprise."""
    if not task.cancelled():
        task.exception()


class FleetReader:
    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self._running: asyncio.Task[Fleet] | None = None
        self._next: asyncio.Task[Fleet] | None = None
        self._last: Fleet | None = None

    async def read(self) -> Fleet:
        """A view of after this call. Raises LinkError, or TimeoutError after READ_WAIT_S."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running), name="read fleet")
            self._next.add_done_callback(heard)
        return await asyncio.shield(self._next)

    async def recent(self, age_max_s: float) -> Fleet:
        if self._last is not None and time.monotonic() - self._last.read_at_s <= age_max_s:
            return self._last
        return await self.read()

    async def close(self) -> None:
        tasks = [task for task in (self._running, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _after(self, earlier: "asyncio.Task[Fleet] | None") -> Fleet:
        if earlier is not None:
            await asyncio.wait([earlier])
        self._running, self._next = self._next, None  # from here on a new caller needs a new read
        async with asyncio.timeout(READ_WAIT_S):
            views = await asyncio.gather(*(cell.nodes() for cell in self._cells))
        nodes = newest_of_each(node for cell_nodes in views for node in cell_nodes)
        self._last = Fleet(nodes, int(time.time() * 1000), time.monotonic())
        return self._last
