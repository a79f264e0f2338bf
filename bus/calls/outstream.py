"""Reading the out-streams of this process: every entry goes to the job it is about, or to who asked the registry.

One blocking read a cell. Nothing that an entry holds may end the reading: a process that is deaf keeps its clients
waiting until their deadlines.
"""

import asyncio
import logging
from collections.abc import Mapping

from bus.calls.call import Call, to_ended
from bus.calls.following import Records
from bus.calls.watch import CallWatch
from bus.cell import Cell
from bus.codec.entries import Answer, Detached, End, Frame, Marker, OutEntry, parse_out
from bus.codec.events import ForeignEntry
from bus.ids import GatewayId
from bus.link import Reader, ServerError
from bus.settings import Settings

log = logging.getLogger(__name__)

READ_MIN, READ_MAX = 8, 512  # entries in one read


class OutStreams:
    """Owned by `Caller`, which shares its table of jobs and of registrations that wait for their answer."""

    def __init__(
        self,
        calls: dict[str, Call],
        answers: dict[str, asyncio.Future[Answer]],
        watch: CallWatch,
        settings: Settings,
        gateway: GatewayId,
        out: str,
    ) -> None:
        self._calls = calls
        self._answers = answers
        self._watch = watch
        self._settings = settings
        self._gateway = gateway
        self._out = out

    async def follow(self, cell: Cell, reader: Reader) -> None:
        """Follow the out-stream from its beginning: it is ours alone, and offsets drop what was heard before."""
        key = cell.keys.out(self._out)
        cursor = "0"
        run_id = ""
        generation = 0
        while True:
            try:
                count = read_count(len(self._calls))
                batch = await reader.xread({key: cursor}, count=count, block_ms=self._settings.block_ms)
            except ServerError as error:
                log.error(
                    "out-stream cannot be read", extra={"gateway": self._gateway, "cell": cell.cell, "why": str(error)}
                )
                await asyncio.sleep(1.0)
                continue
            if reader.generation != generation:
                restarted = bool(run_id) and reader.run_id != run_id
                if generation:
                    self._watch.check_all_soon()
                generation, run_id = reader.generation, reader.run_id
                if restarted:
                    # Another run may have lost our stream's end: its new ids can lie below our cursor.
                    cursor = "0"
                    continue
            for _, entries in batch:
                for entry_id, fields in entries:
                    self._hear(fields)
                    cursor = entry_id
            if batch:
                await asyncio.sleep(0)  # whoever was waited for goes on before the next read is written

    def _hear(self, fields: Mapping[str, bytes]) -> None:
        """An entry that is not ours, or that we cannot fold, is passed over: everybody else's come behind it."""
        try:
            self._take(parse_out(fields))
        except ForeignEntry as error:
            log.warning("foreign entry on the out-stream", extra={"gateway": self._gateway, "why": str(error)})
        except Exception:  # its job is asked for when it has been silent for a while
            log.exception("entry of the out-stream not understood", extra={"gateway": self._gateway})

    def _take(self, entry: OutEntry) -> None:
        if isinstance(entry, Answer):
            future = self._answers.get(entry.id)
            if future is not None and not future.done():
                future.set_result(entry)
            return
        call = self._calls.get(entry.job_id)
        if call is not None:
            self._fold(call, entry)

    def _fold(self, call: Call, entry: OutEntry) -> None:
        call.heard_at = asyncio.get_running_loop().time()
        following = call.following
        match entry:
            case Frame():
                records = None if entry.logprobs is None else Records(entry.logprobs_at, entry.logprobs)
                following.frame(entry.fence, entry.offset, entry.text, records)
            case End():
                whole = entry.text if len(entry.text) == entry.text_len else None
                log = entry.logprobs if len(entry.logprobs or b"") == entry.logprobs_len else None
                following.end(entry.fence, entry.text_len, to_ended(entry), whole, entry.logprobs_len, log)
            case Marker():
                call.node = entry.node
                following.marker(entry.fence, entry.text_len)
                if not following.text and following.hole() is None:
                    return  # nothing that a caller could see
            case Detached():
                # Only a hint: heard late, or again from the beginning of the stream, the job may be back here.
                self._watch.check_soon(call)
                return
        self._watch.settle(call)


def read_count(waiting: int) -> int:
    """How many entries to take at once: about a quarter of the jobs that wait.

    Taking all of them makes callers, server and workers take turns: everybody's answers come in one batch, so their
    next jobs leave in one batch, while all others wait. With less, the next read is on its way meanwhile: at 32 jobs
    in flight benchmarks/bus.py gives 5,000 jobs/s instead of 3,500.
    """
    return min(READ_MAX, max(READ_MIN, waiting // 4))
