"""Reading a stream as one of several consumers of a group, for streams whose handlers are idempotent.

Right for `jobs` and `nodes` only: there an entry may be handled twice, so what a dead consumer left is simply taken
over after an idle time. Work on nodes follows reservations instead (docs/protocol.md).

    new entries (">")          blocking
    own pending entries ("0")  after each (re)connect, and after a batch whose handling failed
    others' pending entries    XAUTOCLAIM every half idle time
    consumers that are gone    removed by themselves at a stop, else by the sweep; only with nothing pending
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from bus.link import Entry, Link, LinkError, Reader, ServerError, to_entry
from bus.scripts import load_script

log = logging.getLogger(__name__)


class GroupReader:
    """One consumer of `group` on `stream`. `next_batch` serves one task; `done` ends what it handed out."""

    def __init__(
        self, link: Link, reader: Reader, stream: str, group: str, consumer: str, *, claim_idle_ms: int
    ) -> None:
        """link: for commands that do not block. consumer: unique among live processes."""
        self.stream = stream
        self.group = group
        self.consumer = consumer
        self._link = link
        self._reader = reader
        self._claim_idle_ms = claim_idle_ms
        self._generation = 0  # of the reader's connection whose lost replies we have looked for
        self._own_pending = False
        self._cursor = "0-0"
        self._claim_at = 0.0

    async def next_batch(self, count: int, block_ms: int) -> list[Entry]:
        """Entries to handle, oldest first; [] after block_ms without any. One without fields is gone: only ack it."""
        if not self._own_pending:
            claimed = await self._claim(count)
            if claimed:
                return claimed
        if self._own_pending:
            pending = await self._read("0", count, 1)
            if pending:
                return pending
            self._own_pending = False
        entries = await self._read(">", count, block_ms)
        if self._reader.generation != self._generation:
            # The server may have handed out entries with a reply that was lost.
            self._generation, self._own_pending = self._reader.generation, True
        return entries

    async def done(self, entry_ids: Sequence[str]) -> None:
        """Acknowledge and delete: called after the effect. Raises LinkDown; the entries then come again."""
        if entry_ids:
            await self._link.script(load_script("settle"), [self.stream], [self.group, *entry_ids])

    def failed(self) -> None:
        """What was handed out could not be handled: the next batches are this consumer's pending entries."""
        self._own_pending = True

    async def unblock(self) -> None:
        """End a read that blocks, so that a stop need not wait for it and no entry is handed to nobody."""
        info = self._reader.info
        if info is not None and self._reader.connected:
            with contextlib.suppress(LinkError):
                await self._link.send("CLIENT", "UNBLOCK", info.client_id)

    async def leave(self) -> None:
        """Remove this consumer, if nothing of it is pending (XGROUP DELCONSUMER drops that silently). Only its own
        reads, which have ended, could add to that."""
        with contextlib.suppress(ServerError):  # NOGROUP: there is nothing to leave
            if not await self._link.send("XPENDING", self.stream, self.group, "-", "+", 1, self.consumer):
                await self._link.send("XGROUP", "DELCONSUMER", self.stream, self.group, self.consumer)

    async def _read(self, start: str, count: int, block_ms: int) -> list[Entry]:
        batch = await self._reader.xreadgroup(
            self.group, self.consumer, {self.stream: start}, count=count, block_ms=block_ms
        )
        return [entry for _, entries in batch for entry in entries]

    async def _claim(self, count: int) -> list[Entry]:
        """Entries that their consumer has not finished within the idle time."""
        now = asyncio.get_running_loop().time()
        if now < self._claim_at:
            return []
        try:
            reply: Any = await self._link.send(
                "XAUTOCLAIM", self.stream, self.group, self.consumer, self._claim_idle_ms, self._cursor, "COUNT", count
            )
        except ServerError as error:
            if error.code != "NOGROUP":
                raise
            self._claim_at = now + self._claim_idle_ms / 2000  # the next read makes the group
            return []
        self._cursor = reply[0].decode()
        if self._cursor == "0-0":
            self._claim_at = now + self._claim_idle_ms / 2000
        entries = [to_entry(raw) for raw in reply[1] if raw is not None]
        if entries:
            log.info("entries taken over", extra={"stream": self.stream, "group": self.group, "count": len(entries)})
        return entries
