"""The front door's shell: entries of `jobs` are admitted or refused, each once, by one script each.

One consumer of the group `dispatcher`. An entry is acknowledged by the script that admits or rejects it, so a crash
in between delivers it again and finds either the entry or its effect.
"""

import asyncio
import logging
from collections.abc import Sequence

from bus.cell import Cell
from bus.codec.wire import Refused, Submission
from bus.jobs import estimate_new_tokens, estimate_prompt_tokens
from bus.keys import DISPATCHER_GROUP
from bus.link import Entry, Fields, LinkError, Reader, ServerError
from bus.link.group import GroupReader
from dispatcher.door import DoorJob, DoorRefusal, read_entry

BATCH = 256

log = logging.getLogger(__name__)


class FrontDoor:
    """One dispatcher's consumer on one cell's `jobs` stream."""

    def __init__(self, cell: Cell, reader: Reader, consumer: str) -> None:
        self._cell = cell
        self._settings = cell.settings
        self._stream = cell.keys.jobs
        self.group = GroupReader(
            cell.link, reader, self._stream, DISPATCHER_GROUP, consumer, claim_idle_ms=cell.settings.claim_idle_ms
        )

    async def step(self) -> None:
        """Wait for entries (at most BLOCK) and end each of them."""
        entries = await self.group.next_batch(BATCH, self._settings.block_ms)
        if entries:
            try:
                await self._handle(entries)
            except LinkError:
                self.group.failed()
                raise

    async def _handle(self, entries: Sequence[Entry]) -> None:
        await self.group.done([entry_id for entry_id, fields in entries if not fields])  # deleted meanwhile
        await asyncio.gather(*(self._end(entry_id, fields) for entry_id, fields in entries if fields))

    async def _end(self, entry_id: str, fields: Fields) -> None:
        asked = read_entry(
            entry_id, fields, cell=self._cell.cell, cells=self._settings.cells, default_model=self._settings.model
        )
        refusal = await self._admit(entry_id, asked) if isinstance(asked, DoorJob) else asked
        if refusal is not None:
            await self._cell.reject(entry_id, refusal.code, refusal.message, refusal.out, refusal.job_id, fields)
            _log_refusal(entry_id, refusal)

    async def _admit(self, entry_id: str, asked: DoorJob) -> DoorRefusal | None:
        """What is still to be answered: an entry that the server refuses must not come again for ever."""
        try:
            admitted = await self._cell.admit(entry_id, to_submission(asked, self._settings.job_deadline_ms))
        except ServerError as error:
            if error.may_pass:
                raise
            return DoorRefusal(asked.job_id, "server_error", f"the server refuses it: {error}", asked.out)
        if isinstance(admitted, Refused):
            _log_refusal(entry_id, DoorRefusal(asked.job_id, admitted.code, admitted.reason, asked.out))
        return None


def _log_refusal(entry_id: str, refusal: DoorRefusal) -> None:
    extra = {"entry": entry_id, "job": refusal.job_id, "code": refusal.code, "why": refusal.message}
    log.info("refused", extra=extra)


def to_submission(asked: DoorJob, deadline_in_ms: int) -> Submission:
    """Nobody waits on a connection for a plain producer's job, so it is kept whoever goes."""
    return Submission(
        job_id=asked.job_id,
        job=asked.job,
        out=asked.out,
        policy="keep",
        deadline_in_ms=deadline_in_ms,
        est_prompt=estimate_prompt_tokens(asked.job),
        est_new=estimate_new_tokens(asked.job),
    )
