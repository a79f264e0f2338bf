"""What a caller does about silence: leases, holes, state checks, re-drives, and clients that went away.

One ticking task for all jobs of the process. The decision (`next_step`) is pure; acting on it is one request each.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Literal

import msgspec

from bus.calls.following import Ended, Hole, interrupted
from bus.calls.handle import Call
from bus.cell import Cell
from bus.codec.wire import Accepted, JobRecord, NotYours, Refused, attempt_of
from bus.ids import Fence, GatewayId, JobId, parse_cell
from bus.link import LinkError
from bus.settings import Settings

log = logging.getLogger(__name__)

ELSEWHERE_CHECK_S = 1.0
IN_FLIGHT_MAX = 256  # state checks at a time

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

Step = Literal["nothing", "check", "cancel", "forget", "end"]


def next_step(call: Call, now: float, *, silence_s: float, grace_s: float) -> Step:
    """What is due for this job at loop time `now`."""
    if now >= call.deadline_at:
        return "end"
    if call.cancelled_by:
        return "cancel"
    if call.closing_at is not None and now - call.closing_at >= grace_s:
        return "cancel" if call.policy == "cancel" and not call.elsewhere else "forget"
    patience_s = ELSEWHERE_CHECK_S if call.elsewhere else silence_s
    return "check" if now - call.heard_at >= patience_s else "nothing"


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
        self._check_all = False
        self._tick = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: renew the leases, then look at every job."""
        loop = asyncio.get_running_loop()
        pause_s = min(0.25, self._settings.renew_ms / 1000, self._settings.silence_ms / 4000)
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
        for task in list(self._work):
            task.cancel()
        if hand_over:
            return
        for call in list(self._calls.values()):
            if call.policy == "cancel" and not call.elsewhere and call.following.ended is None:
                self._spawn(self._cancel(call, "caller stopped"))
        for cell in self._cells:
            self._spawn(self._drop_lease(cell))
        if self._work:
            await asyncio.wait(self._work, timeout=2.0)
        for task in list(self._work):
            task.cancel()

    def check_all_soon(self) -> None:
        """After a reconnect or on another server run: what we waited for may be over, moved or forgotten."""
        self._check_all = True
        self._tick.set()

    def fill_soon(self, call: Call) -> None:
        if not call.filling:
            call.filling = True
            self._spawn(self._fill(call))

    async def check(self, call: Call) -> None:
        """Ask for the job's state and take it over. Raises LinkError."""
        cell = self._cell(call.job_id)
        call.heard_at = asyncio.get_running_loop().time()
        record = await cell.job(call.job_id)
        if call.following.ended is not None:
            return
        if record is None:
            await self._redrive(call, cell)
        else:
            await self.take_record(call, cell, record)

    async def take_record(self, call: Call, cell: Cell, record: JobRecord) -> None:
        """Fold a job hash as if its news had come on the stream. Raises LinkError."""
        following = call.following
        if record.ended:
            text = None if following.streamed and following.text else await cell.text(call.job_id, record.fence)
            if following.streamed:
                following.end(record.fence, record.text_len, ended_of(record), None)
                hole = following.hole()
                if text is not None and hole is not None and hole.start == 0:
                    following.filled(hole, text)
            else:
                following.end(record.fence, record.text_len, ended_of(record), text)
        elif record.route.gateway != self._gateway and not call.elsewhere:
            call.detached_by = record.route.gateway or record.route.out
            call.elsewhere = not following.streamed
        elif record.state == "running" and record.fence != following.fence:
            call.node = record.node
            following.marker(record.fence, record.text_len)
        call.deadline_ms = call.deadline_ms or record.deadline_ms
        self._after(call)

    # steps

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        everything, self._check_all = self._check_all, False
        silence_s = self._settings.silence_ms / 1000
        grace_s = self._settings.client_grace_ms / 1000
        for call in list(self._calls.values()):
            step = next_step(call, now, silence_s=silence_s, grace_s=grace_s)
            if step == "end":
                call.following.give_up(LATE)
                self._after(call)
            elif step == "cancel":
                call.closing_at = now  # tried again after another grace
                self._spawn(self._cancel(call, call.cancelled_by or "client gone"))
            elif step == "forget":
                del self._calls[call.job_id]
            elif step == "check" or everything:
                if len(self._work) >= IN_FLIGHT_MAX:
                    self._check_all = everything
                    return
                call.heard_at = now
                self._spawn(self._check_quietly(call))

    async def _renew(self, cell: Cell) -> None:
        try:
            await cell.lease(self._gateway)
        except LinkError as error:
            log.warning(
                "gateway lease not renewed", extra={"gateway": self._gateway, "cell": cell.cell, "why": str(error)}
            )

    async def _drop_lease(self, cell: Cell) -> None:
        try:
            await cell.drop_lease(self._gateway)
        except LinkError as error:
            log.info("gateway lease left to lapse", extra={"gateway": self._gateway, "why": str(error)})

    async def _check_quietly(self, call: Call) -> None:
        try:
            await self.check(call)
        except LinkError as error:
            log.info("job state not known yet", extra={"job": call.job_id, "why": str(error)})

    async def _fill(self, call: Call) -> None:
        """Read what is missing from the stored text, until nothing is."""
        cell = self._cell(call.job_id)
        try:
            while (hole := call.following.hole()) is not None:
                data = await cell.text(call.job_id, Fence(hole.fence), hole.start, hole.end)
                if not call.following.filled(hole, data):
                    await self._explain_hole(call, cell, hole)
                    break
        except LinkError as error:
            # The next check (after the reconnect or the silence) finds the hole again.
            log.info("missing text not read yet", extra={"job": call.job_id, "why": str(error)})
        finally:
            call.filling = False
        self._after(call, refill=False)

    async def _explain_hole(self, call: Call, cell: Cell, hole: Hole) -> None:
        """The stored text does not have it: a newer attempt, a forgotten job, or a text that has expired."""
        record = await cell.job(call.job_id)
        following = call.following
        if record is None:
            if following.waiting_for_text() is not None:
                following.give_up(interrupted("the stored answer has expired before it was read"))
            else:
                await self._redrive(call, cell)
        elif record.ended and record.fence == hole.fence:
            following.give_up(interrupted("the stored answer is not complete; ask again"))
        elif record.state == "running" and record.fence != hole.fence:
            following.marker(record.fence, record.text_len)

    async def _redrive(self, call: Call, cell: Cell) -> None:
        """The server has forgotten the job: submit the same id again, with what was shown of it."""
        submission = call.submission
        if submission is None or call.elsewhere:
            call.following.give_up(LOST)
            self._after(call)
            return
        following = call.following
        shown = bytes(following.text) if following.streamed else b""
        again = msgspec.structs.replace(
            submission,
            redrive=True,
            attempt_floor=attempt_of(Fence(following.fence)) if following.fence else 0,
            shown_text=shown,
            deadline_at_ms=call.deadline_ms,
        )
        answer = await cell.submit(again)
        log.warning(
            "job driven again", extra={"job": call.job_id, "shown": len(shown), "answer": type(answer).__name__}
        )
        match answer:
            case Refused():
                following.give_up(
                    Ended(state="failed", reason=answer.code, error_code=answer.code, error_message=answer.reason)
                )
            case Accepted():
                call.deadline_ms = answer.deadline_ms
        self._after(call)

    async def _cancel(self, call: Call, by: str) -> None:
        only = None if call.cancelled_by else self._gateway
        try:
            result = await self._cell(call.job_id).cancel(call.job_id, by, only_gateway=only)
        except LinkError as error:
            log.info("cancel not delivered yet", extra={"job": call.job_id, "why": str(error)})
            return
        call.cancelled_by = ""
        if not call.handles:
            # Nobody waits for the end any more; the job's terminal is stored all the same.
            self._calls.pop(call.job_id, None)
        elif isinstance(result, NotYours):
            self.check_all_soon()

    def _after(self, call: Call, *, refill: bool = True) -> None:
        if call.following.ended is not None:
            if self._calls.get(call.job_id) is call:
                del self._calls[call.job_id]
        elif refill and call.following.hole() is not None:
            self.fill_soon(call)
        call.wake()

    def _cell(self, job_id: JobId) -> Cell:
        cell = parse_cell(job_id, len(self._cells))
        assert cell is not None, "only ids of our layout enter the table"
        return self._cells[cell]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("watching a job failed", exc_info=error)


def ended_of(record: JobRecord) -> Ended:
    reason = record.error_code if record.reason == "error" and record.error_code else record.reason
    return Ended(
        state=record.state,
        reason=reason,
        prompt_tokens=record.prompt_tokens,
        new_tokens=record.new_tokens,
        node=record.node,
        error_code=record.error_code,
        error_message=record.error_message,
        attempts=attempt_of(record.fence),
    )
