"""What a caller does about silence: leases, holes, state checks, re-drives, and clients that went away.

One ticking task for all jobs of the process. The decisions (`next_step`, `after_loss`) are pure and lie in
`bus.calls.call`; acting on one is an errand to the server: one of a kind a job, and CHECKS_MAX checks in all.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from bus.calls.call import Call, Errand, after_loss, next_step, to_ended, where_of
from bus.calls.following import Ended, Following, Hole, Records, interrupted
from bus.cell import Cell
from bus.codec.wire import Accepted, JobRecord, NotYours, Refused, Submission, attempt_of, make_fence
from bus.ids import Fence, GatewayId, JobId, parse_cell
from bus.link import LinkError
from bus.settings import Settings

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at all jobs, at most
CHECKS_MAX = 256  # state checks at a time
LOSS_WAIT_MS = 3_000  # beyond the silence after which the process that holds the request notices a loss
DEADLINE_LEASES = 3  # how long after its deadline a job may still be heard of: the sweep and its grace take time

LOST = Ended(
    state="failed",
    reason="lost",
    error_code="lost",
    error_message="the server has forgotten this job and the request is not held here; send it again",
)
LATE = Ended(
    state="failed",
    reason="deadline",
    error_code="deadline",
    error_message="the job was not finished within its deadline, and the job store does not answer",
)


class CallWatch:
    """Owned by `Caller`, which shares its table and cells."""

    def __init__(
        self, calls: dict[str, Call], cells: list[Cell], settings: Settings, gateway: GatewayId, out: str
    ) -> None:
        self._calls = calls
        self._cells = cells
        self._settings = settings
        self._gateway = gateway
        self._out = out
        self._work: set[asyncio.Task[None]] = set()
        self._due: OrderedDict[str, None] = OrderedDict()  # jobs to be checked as soon as there is room
        self._checking = 0
        self._check_all = False
        self._tick = asyncio.Event()
        self._clock_ms: dict[int, float] = {}  # per cell: the server's clock minus ours (loop time)

    async def run(self) -> None:
        """Until cancelled: renew the leases, then look at every job."""
        loop = asyncio.get_running_loop()
        pause_s = min(LOOK_S, self._settings.renew_ms / 1000, self._settings.silence_ms / 4000)
        renew_at = loop.time()
        while True:
            if loop.time() >= renew_at:
                renew_at = loop.time() + self._settings.renew_ms / 1000
                for cell in self._cells:
                    self._spawn(self._renew(cell))
            self._look()
            try:
                async with asyncio.timeout(pause_s):
                    await self._tick.wait()
            except TimeoutError:
                pass
            self._tick.clear()

    async def close(self, *, hand_over: bool) -> None:
        """Cancel, as far as the server answers, the jobs whose policy says so, and give up the leases."""
        self._due.clear()
        for task in list(self._work):
            task.cancel()
        if hand_over:
            return
        for call in list(self._calls.values()):
            if call.policy == "cancel" and call.where in ("asking", "here") and call.following.ended is None:
                self._spawn(self._cancel(call))
        for cell in self._cells:
            self._spawn(self._drop_lease(cell))
        if self._work:
            await asyncio.wait(self._work, timeout=2.0)
        for task in list(self._work):
            task.cancel()

    async def renew(self, cell: Cell) -> None:
        """Renew our lease in a cell; the answer tells the server's clock. Raises LinkError."""
        expires_ms = await cell.lease(self._gateway)
        now_ms = asyncio.get_running_loop().time() * 1000
        self._clock_ms[cell.cell] = expires_ms - self._settings.lease_ms - now_ms

    def expect_by(self, call: Call, deadline_ms: int) -> None:
        """The job's deadline, as the server has it."""
        call.deadline_ms = deadline_ms
        clock_ms = self._clock_ms.get(self._cell(call.job_id).cell)
        if clock_ms is not None:
            call.deadline_at = (deadline_ms - clock_ms + DEADLINE_LEASES * self._settings.lease_ms) / 1000

    def check_all_soon(self) -> None:
        """After a reconnect or on another server run: what we waited for may be over, moved or forgotten."""
        self._check_all = True
        self._tick.set()

    def check_soon(self, call: Call) -> None:
        call.heard_at = float("-inf")
        self._tick.set()

    def fill_soon(self, call: Call) -> None:
        self._start("fill", call, self._fill)

    async def check_quietly(self, call: Call) -> None:
        """As `check`, but what could not be asked now is left to the next time."""
        try:
            await self.check(call)
        except LinkError as error:
            log.info("job state not known yet", extra={"job": call.job_id, "why": str(error)})

    async def check(self, call: Call) -> None:
        """Ask for the job's state and take it over. Raises LinkError."""
        cell = self._cell(call.job_id)
        call.heard_at = asyncio.get_running_loop().time()
        markers = call.following.markers
        record = await cell.job(call.job_id)
        if call.following.ended is not None:
            return
        if record is None:
            await self._lost(call, cell)
        else:
            await self.take_record(call, cell, record, markers)

    async def take_record(self, call: Call, cell: Cell, record: JobRecord, markers: int) -> None:
        """Fold a job hash as if its news had come on the stream. Raises LinkError.

        markers: how many had been heard when it was asked for. If one has come since, the record is the older news.
        """
        call.missing_at = None
        self.expect_by(call, record.deadline_ms)
        if call.submission is None:
            call.policy = "keep" if record.policy == "keep" else "cancel"
        if record.ended:
            if call.where == "asking":
                call.move_to(where_of(record.route, self._gateway))
            await self._take_end(call, cell, record)
        elif call.following.markers == markers:
            call.move_to(where_of(record.route, self._gateway), record.route.gateway or record.route.out)
            if call.where == "stored":
                await self._take_stored(call, cell, record)
            elif record.state == "running" and record.fence != call.following.fence:
                call.node = record.node
                call.following.marker(record.fence, record.text_len)
        self.settle(call)

    def settle(self, call: Call, *, refill: bool = True) -> None:
        """After news of a job: it leaves the table at its end, its holes are filled, its handles wake."""
        if call.following.ended is not None:
            if self._calls.get(call.job_id) is call:
                del self._calls[call.job_id]
        elif refill and call.following.hole() is not None:
            self.fill_soon(call)
        call.wake()

    # steps

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._check_all:
            self._check_all = False
            self._due.update(dict.fromkeys(self._calls))
        silence_s = self._settings.silence_ms / 1000
        grace_s = self._settings.client_grace_ms / 1000
        for call in list(self._calls.values()):
            match next_step(call, now, silence_s=silence_s, grace_s=grace_s):
                case "end":
                    call.following.give_up(LATE)
                    self.settle(call)
                case "cancel":
                    call.tried_at = now
                    self._start("cancel", call, self._cancel)
                case "forget":
                    del self._calls[call.job_id]
                case "check":
                    self._due[call.job_id] = None
        self._check_due()

    def _check_due(self) -> None:
        """Start the checks that are due, the longest waiting first; those without room follow as others end."""
        while self._due and self._checking < CHECKS_MAX:
            job_id, _ = self._due.popitem(last=False)
            call = self._calls.get(job_id)
            if call is not None and call.where != "asking" and "check" not in call.errands:
                self._checking += 1
                self._start("check", call, self._check_one)

    async def _check_one(self, call: Call) -> None:
        try:
            await self.check_quietly(call)
        finally:
            self._checking -= 1
            self._check_due()

    async def _take_end(self, call: Call, cell: Cell, record: JobRecord) -> None:
        following = call.following
        text = None if following.streamed and following.text else await cell.text(call.job_id, record.fence)
        records = await self._stored_records(call, cell, record, 0)
        if not following.streamed:
            await _take_in_parts(following, 0, records)
        if not following.streamed:
            following.end(record.fence, record.text_len, to_ended(record), text, len(records or b""), records)
            return
        following.end(record.fence, record.text_len, to_ended(record), None, len(records or b""))
        hole = following.hole()
        if text is not None and hole is not None and hole.start == 0:
            missing = (records or b"")[hole.logprobs_from or 0 :]
            await _take_in_parts(following, hole.logprobs_from or 0, missing)
            following.filled(hole, text, missing)

    async def _take_stored(self, call: Call, cell: Cell, record: JobRecord) -> None:
        """No frames come of a plain producer's job: read what is stored. That of a new attempt is read from its
        beginning, so that it is compared with what was shown."""
        following = call.following
        call.node = record.node
        start = len(following.text)
        if record.fence != following.fence:
            following.marker(record.fence, 0)
            start = 0
        if record.text_len > start:
            text = await cell.text(call.job_id, record.fence, start)
            known = len(following.logprobs.raw) if start and following.logprobs is not None else 0
            records = await self._stored_records(call, cell, record, known)
            await _take_in_parts(following, known, records)
            following.frame(record.fence, start, text, None if records is None else Records(known, records))

    async def _stored_records(self, call: Call, cell: Cell, record: JobRecord, start: int) -> bytes | None:
        """Stored log probabilities from byte `start` on, if the job asks for them. Read them after the text."""
        if call.following.logprobs is None:
            return None
        return await cell.logprobs(call.job_id, record.fence, start)

    async def _renew(self, cell: Cell) -> None:
        try:
            await self.renew(cell)
        except LinkError as error:
            log.warning(
                "gateway lease not renewed", extra={"gateway": self._gateway, "cell": cell.cell, "why": str(error)}
            )

    async def _drop_lease(self, cell: Cell) -> None:
        try:
            await cell.drop_lease(self._gateway)
        except LinkError as error:
            log.info("gateway lease left to lapse", extra={"gateway": self._gateway, "why": str(error)})

    async def _fill(self, call: Call) -> None:
        """Read what is missing from the stored text, until nothing is."""
        cell = self._cell(call.job_id)
        try:
            while (hole := call.following.hole()) is not None:
                fence, start = Fence(hole.fence), hole.logprobs_from
                data = await cell.text(call.job_id, fence, hole.start, hole.end)
                records = b"" if start is None else await cell.logprobs(call.job_id, fence, start)
                await _take_in_parts(call.following, start or 0, records)
                if not call.following.filled(hole, data, records):
                    await self._explain_hole(call, cell, hole)
                    break
        except LinkError as error:
            # The next check (after the reconnect or the silence) finds the hole again.
            log.info("missing text not read yet", extra={"job": call.job_id, "why": str(error)})
        self.settle(call, refill=False)

    async def _explain_hole(self, call: Call, cell: Cell, hole: Hole) -> None:
        """The stored text does not have it: a newer attempt, a forgotten job, or a text that has expired."""
        markers = call.following.markers
        record = await cell.job(call.job_id)
        following = call.following
        if following.markers != markers:
            return  # a newer attempt was heard of meanwhile
        if record is None:
            if following.waiting_for_text() is not None:
                following.give_up(interrupted("the stored answer has expired before it was read"))
            else:
                await self._lost(call, cell)
        elif record.ended and record.fence == hole.fence:
            following.give_up(interrupted("the stored answer is not complete; ask again"))
        elif record.state == "running" and record.fence != hole.fence:
            following.marker(record.fence, record.text_len)

    async def _lost(self, call: Call, cell: Cell) -> None:
        """The server does not know the job."""
        now = asyncio.get_running_loop().time()
        call.missing_at = now if call.missing_at is None else call.missing_at
        match after_loss(call, now, wait_s=(self._settings.silence_ms + LOSS_WAIT_MS) / 1000):
            case "redrive":
                assert call.submission is not None
                await self._redrive(call, cell, call.submission)
            case "give up":
                call.following.give_up(LOST)
                self.settle(call)

    async def _redrive(self, call: Call, cell: Cell, submission: Submission) -> None:
        """Submit the same id again, with what was shown of it."""
        following = call.following
        shown = bytes(following.text) if following.streamed else b""
        floor = attempt_of(Fence(following.fence)) if following.fence else 0
        if shown and following.logprobs is not None:
            raw = bytes(following.logprobs.raw)
            await cell.keep_logprobs(call.job_id, make_fence(floor, "r"), raw, call.deadline_ms)
        again = msgspec.structs.replace(
            submission,
            job=msgspec.structs.replace(submission.job, stream=following.streamed),
            redrive=True,
            attempt_floor=floor,
            shown_text=shown,
            deadline_at_ms=call.deadline_ms,
        )
        answer = await cell.submit(again)
        if isinstance(answer, Accepted) and answer.job_id != call.job_id:
            # The record of the idempotency key was lost too, and a retry has begun another job under the key.
            answer = await cell.submit(msgspec.structs.replace(again, idem_key=""))
        log.warning(
            "job driven again", extra={"job": call.job_id, "shown": len(shown), "answer": type(answer).__name__}
        )
        match answer:
            case Refused():
                following.give_up(
                    Ended(state="failed", reason=answer.code, error_code=answer.code, error_message=answer.reason)
                )
            case Accepted():
                call.missing_at = None
                self.expect_by(call, answer.deadline_ms)
                ours = not answer.existing or answer.gateway == self._gateway
                call.move_to("here" if ours else "elsewhere", answer.gateway)
        self.settle(call)

    async def _cancel(self, call: Call) -> None:
        explicit = bool(call.cancelled_by)
        by, only = (call.cancelled_by, None) if explicit else ("client gone", self._gateway)
        try:
            result = await self._cell(call.job_id).cancel(call.job_id, by, only_gateway=only)
        except LinkError as error:
            log.info("cancel not delivered yet", extra={"job": call.job_id, "why": str(error)})
            return
        if explicit:
            call.cancelled_by = ""
        if not call.handles:
            # Nobody waits for the end any more; the job's terminal is stored all the same.
            self._calls.pop(call.job_id, None)
        elif isinstance(result, NotYours):
            self.check_soon(call)

    def _cell(self, job_id: JobId) -> Cell:
        cell = parse_cell(job_id, len(self._cells))
        assert cell is not None, "only ids of our layout enter the table"
        return self._cells[cell]

    def _start(self, errand: Errand, call: Call, work: Callable[[Call], Coroutine[Any, Any, None]]) -> None:
        """Begin an errand for a job, unless one of its kind is on its way."""
        if errand not in call.errands:
            call.errands.add(errand)
            self._spawn(self._run_errand(errand, call, work))

    async def _run_errand(self, errand: Errand, call: Call, work: Callable[[Call], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(call)
        finally:
            call.errands.discard(errand)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("watching a job failed", exc_info=error)


async def _take_in_parts(following: Following, offset: int, records: bytes | None) -> None:
    """Between the parts others' work goes on."""
    for _ in following.take_in_parts(offset, records or b""):
        await asyncio.sleep(0)
