"""Caller: submits jobs and follows them to their one end. Gateways and `millrace.Client` are built on it.

Theory of operation. A process has one id, one out-stream a cell (`gateway:<id>`), one blocking read and one pipelining
writer a cell; thousands of waiting callers are entries of a dictionary. Everything the out-stream says is folded by
`Following`; what it does not say is asked for: a hole is read from the stored text, and after a reconnect, on another
server run or after `silence_ms` the job's state is checked. A job that the server has forgotten (it lost its last
second) is submitted again under the same id with what was shown. So a job ends exactly once for its caller, whichever
process dies.

    submit --> Call in the table --> entries --> Following --> handles wake --> ended: Call leaves the table
                   |                                ^
                   +-- every tick: silent? hole? closed? deadline? ---> ask the server ---+
"""

import asyncio
import logging
import secrets
import uuid
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from bus.calls.following import Ended, Following
from bus.calls.handle import Call, JobHandle
from bus.calls.watch import CallWatch
from bus.cell import Cell
from bus.codec.entries import Answer, Detached, End, Frame, Marker, OutEntry, parse_out
from bus.codec.events import ForeignEntry, NodeRegistered
from bus.codec.wire import (
    TERMINAL_STATES,
    Accepted,
    Attached,
    CancelResult,
    JobRecord,
    NotYours,
    Policy,
    Refused,
    Submission,
)
from bus.ids import GatewayId, JobId, cell_of_model, new_job_id, parse_cell
from bus.jobs import ChatJob, estimate_new_tokens, estimate_prompt_tokens
from bus.keys import CellKeys
from bus.link import Link, LinkDown, LinkError, Reader, ServerAddress, ServerError
from bus.settings import Settings

log = logging.getLogger(__name__)

READ_MIN, READ_MAX = 8, 512  # entries in one read of the out-stream
TRY_AGAIN_CODES = frozenset({"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "UNBLOCKED"})
TRY_AGAIN_S = 0.1
SHUTTING_DOWN = Ended(
    state="failed",
    reason="shutting_down",
    error_code="shutting_down",
    error_message="this process is stopping; fetch the job by its id from another one",
)


class Refusal(Exception):
    """The job was not accepted. code: as in bus.codec.wire.Refused, or `unavailable` (the server cannot be reached)."""

    def __init__(self, code: str, reason: str, retry_after_ms: int = 0) -> None:
        super().__init__(reason)
        self.code, self.reason, self.retry_after_ms = code, reason, retry_after_ms


class UnknownJob(Exception):
    """No such job, or its result has expired."""


class CallOptions(msgspec.Struct, frozen=True):
    """Everything about a call that is not the generation itself."""

    policy: Policy = "cancel"
    deadline_in_ms: int | None = None  # None: the setting
    tenant: str = ""
    idem_key: str = ""
    body_digest: str = ""
    address: str = ""
    key_id: str = ""
    quota_max: int = 0
    own_id: str | None = None  # second half of the job id; None: random


DEFAULT_OPTIONS = CallOptions()


class Caller:
    """Use as `async with await Caller.open(settings)`, or start() and close()."""

    def __init__(self, address: ServerAddress, settings: Settings, *, name: str = "caller") -> None:
        self.id = GatewayId(f"{name}-{secrets.token_hex(6)}")
        self.out = f"gateway:{self.id}"
        self.settings = settings
        self.cells: list[Cell] = []
        self._address = address
        self._calls: dict[str, Call] = {}
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._readers: list[Reader] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._watch = CallWatch(self._calls, self.cells, settings, self.id, self.out)

    async def start(self) -> Self:
        """Connect to every cell. Raises LinkDown or ServerError."""
        try:
            for number in range(self.settings.cells):
                await self._start_cell(number)
        except BaseException:
            await self.close()
            raise
        for cell, reader in zip(self.cells, self._readers, strict=True):
            self._spawn(self._read(cell, reader), f"out-stream {cell.cell}")
        self._spawn(self._watch.run(), "call watch")
        return self

    async def close(self, *, hand_over: bool = False) -> None:
        """Close the connections; handles still open end with `shutting_down`.

        Open jobs are cancelled, where that is their policy, and the leases given up. With `hand_over` (a gateway that
        stops) both are left to lapse: until then a client may resume its stream on another gateway.
        """
        await self._watch.close(hand_over=hand_over)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        for call in list(self._calls.values()):
            call.following.give_up(SHUTTING_DOWN)
            call.wake()
        self._calls.clear()
        for reader in self._readers:
            await reader.close()
        for cell in self.cells:
            await cell.link.close()

    async def __aenter__(self) -> Self:
        return self if self.cells else await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def connected(self) -> bool:
        return bool(self.cells) and all(cell.link.connected for cell in self.cells)

    @property
    def waiting(self) -> int:
        """Jobs that this process waits for."""
        return len(self._calls)

    def cell_of(self, model: str) -> Cell:
        return self.cells[cell_of_model(model, len(self.cells))]

    def cell_of_job(self, job_id: str) -> Cell | None:
        cell = parse_cell(job_id, len(self.cells))
        return None if cell is None else self.cells[cell]

    # jobs

    async def submit(self, job: ChatJob, options: CallOptions = DEFAULT_OPTIONS) -> JobHandle:
        """Raises Refusal with the reason and an honest wait. The handle must be closed."""
        cell = self.cell_of(job.model)
        submission = self._submission(cell, job, options)
        call = self._enter(submission.job_id, Following(streamed=job.stream), submission)
        handle = JobHandle(call, 0)
        try:
            answer = await self._submit(cell, submission)
        except BaseException:
            handle.close("cancel")
            raise
        if isinstance(answer, Refused):
            self._leave(call)
            raise Refusal(answer.code, answer.reason, answer.retry_after_ms)
        if answer.existing or answer.job_id != call.job_id:
            return await self._follow_existing(cell, call, handle, answer)
        call.deadline_ms = answer.deadline_ms
        return handle

    async def attach(self, job_id: str, offset: int = 0) -> JobHandle:
        """Take a job's stream over, from byte `offset` of its answer. Raises UnknownJob, LinkDown, ServerError."""
        known = self._calls.get(job_id)
        if known is not None and not known.elsewhere:
            return JobHandle(known, offset, existing=True)
        cell = self.cell_of_job(job_id)
        if cell is None:
            raise UnknownJob(job_id)
        call = self._enter(JobId(job_id), Following(streamed=True), None)
        handle = JobHandle(call, offset, existing=True)
        try:
            found = await cell.attach(call.job_id, self.id, self.out)
        except BaseException:
            self._leave(call)
            raise
        match found:
            case Attached():
                call.deadline_ms = found.deadline_ms
                call.following.marker(found.fence, found.text_len)
                self._settle(call)
            case JobRecord():
                await self._watch.take_record(call, cell, found)
            case _:
                self._leave(call)
                raise UnknownJob(job_id)
        return handle

    async def cancel(self, job_id: str, by: str) -> CancelResult:
        """Raises UnknownJob, LinkDown, ServerError. A job of this process that the server cannot be told about yet is
        cancelled as soon as it can."""
        cell = self.cell_of_job(job_id)
        if cell is None:
            raise UnknownJob(job_id)
        call = self._calls.get(job_id)
        if call is not None:
            call.cancelled_by = by
        result = await cell.cancel(JobId(job_id), by)
        if call is not None:
            call.cancelled_by = ""
        if isinstance(result, NotYours) and result.state == "unknown":
            raise UnknownJob(job_id)
        return result

    # nodes

    async def ask(self, event: NodeRegistered, cell: Cell, timeout_s: float) -> Answer | None:
        """Publish a registration and wait until the registry has applied it; None: not within the time."""
        answer_id = uuid.uuid4().hex
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[answer_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                await cell.publish_node_event(msgspec.structs.replace(event, answer_to=self.out, answer_id=answer_id))
                return await future
        except TimeoutError:
            return None
        finally:
            del self._answers[answer_id]

    # the table

    def _enter(self, job_id: JobId, following: Following, submission: Submission | None) -> Call:
        now = asyncio.get_running_loop().time()
        deadline_in_ms = submission.deadline_in_ms if submission is not None else self.settings.job_deadline_ms
        deadline_at = now + (deadline_in_ms + 3 * self.settings.lease_ms) / 1000
        call = self._calls[job_id] = Call(job_id, following, submission, now, deadline_at)
        return call

    def _leave(self, call: Call) -> None:
        if self._calls.get(call.job_id) is call:
            del self._calls[call.job_id]

    def _submission(self, cell: Cell, job: ChatJob, options: CallOptions) -> Submission:
        return Submission(
            job_id=new_job_id(cell.cell, options.own_id),
            job=job,
            out=self.out,
            gateway=self.id,
            policy=options.policy,
            deadline_in_ms=options.deadline_in_ms or self.settings.job_deadline_ms,
            est_prompt=estimate_prompt_tokens(job),
            est_new=estimate_new_tokens(job),
            tenant=options.tenant,
            idem_key=options.idem_key,
            body_digest=options.body_digest,
            address=options.address,
            key_id=options.key_id,
            quota_max=options.quota_max,
        )

    async def _submit(self, cell: Cell, submission: Submission) -> Accepted | Refused:
        """Submit until the server has answered: the same id again finds the job that a lost reply made."""
        loop = asyncio.get_running_loop()
        until = loop.time() + 2 * self.settings.send_wait_ms / 1000
        while True:
            try:
                return await cell.submit(submission)
            except LinkDown as error:
                problem: LinkError = error
            except ServerError as error:
                if error.code not in TRY_AGAIN_CODES:
                    raise
                problem = error
            if loop.time() >= until:
                raise Refusal("unavailable", f"the job store does not answer ({problem})", 2_000) from problem
            await asyncio.sleep(TRY_AGAIN_S)

    async def _follow_existing(self, cell: Cell, call: Call, handle: JobHandle, answer: Accepted) -> JobHandle:
        """The id or the idempotency key was there before: wait for that job, without taking it from another caller
        unless we stream. A job under the id of an earlier request that we were the first to create is ours."""
        if answer.job_id != call.job_id:
            self._leave(call)
            known = self._calls.get(answer.job_id)
            if known is not None:
                return JobHandle(known, 0, existing=True)
        if answer.state in TERMINAL_STATES or answer.gateway == self.id:
            call = call if answer.job_id == call.job_id else self._enter(answer.job_id, call.following, call.submission)
            handle = handle if answer.job_id == handle.job_id else JobHandle(call, 0)
            handle.existing = True
            await self._watch.check(call)
            return handle
        if call.following.streamed:
            self._leave(call)
            return await self.attach(answer.job_id)
        follower = self._enter(answer.job_id, Following(streamed=False), None)
        follower.elsewhere = True
        follower.policy = "keep"
        follower.deadline_ms = answer.deadline_ms
        await self._watch.check(follower)
        return JobHandle(follower, 0, existing=True)

    # the out-streams

    async def _start_cell(self, number: int) -> None:
        timeout_s = self.settings.connect_timeout_ms / 1000
        key = CellKeys(number).out(self.out)
        link = await Link.connect(
            self._address,
            name=f"{self.id} c{number}",
            cell_key=key,
            connect_timeout_s=timeout_s,
            wait_s=self.settings.send_wait_ms / 1000,
        )
        cell = Cell(link, number, self.settings)
        self.cells.append(cell)
        self._readers.append(
            Reader(self._address, name=f"{self.id} c{number} out", cell_key=key, connect_timeout_s=timeout_s)
        )
        link.on_reconnect(self._watch.check_all_soon)
        await cell.lease(self.id)

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=f"{self.id} {name}")
        task.add_done_callback(_report)
        self._tasks.append(task)

    async def _read(self, cell: Cell, reader: Reader) -> None:
        """Follow the out-stream from its beginning: it is ours alone, and offsets drop what was heard before."""
        key = cell.keys.out(self.out)
        cursor = "0"
        run_id = ""
        generation = 0
        while True:
            try:
                count = read_count(self.waiting)
                batch = await reader.xread({key: cursor}, count=count, block_ms=self.settings.block_ms)
            except ServerError as error:
                log.error("out-stream cannot be read", extra={"gateway": self.id, "cell": cell.cell, "why": str(error)})
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

    def _hear(self, fields: Mapping[str, bytes]) -> None:
        try:
            entry = parse_out(fields)
        except ForeignEntry as error:
            log.warning("foreign entry on the out-stream", extra={"gateway": self.id, "why": str(error)})
            return
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
                following.frame(entry.fence, entry.offset, entry.text)
            case End():
                whole = entry.text if len(entry.text) == entry.text_len else None
                following.end(entry.fence, entry.text_len, to_ended(entry), whole)
            case Marker():
                call.node = entry.node
                following.marker(entry.fence, entry.text_len)
                if not following.text and following.hole() is None:
                    return  # nothing that a caller could see
            case Detached():
                if entry.by != self.id:
                    call.detached_by = entry.by
                    call.elsewhere = not following.streamed
        self._settle(call)

    def _settle(self, call: Call) -> None:
        if call.following.ended is not None:
            self._leave(call)
        elif call.following.hole() is not None:
            self._watch.fill_soon(call)
        call.wake()


def read_count(waiting: int) -> int:
    """How many entries to take at once: about a quarter of the jobs that wait.

    Taking all of them makes callers, server and workers take turns: everybody's answers come in one batch, so their
    next jobs leave in one batch, while all others wait. With less, the next read is on its way meanwhile: at 32 jobs
    in flight benchmarks/bus.py gives 5,000 jobs/s instead of 3,500.
    """
    return min(READ_MAX, max(READ_MIN, waiting // 4))


def to_ended(end: End) -> Ended:
    reason = end.error_code if end.reason == "error" and end.error_code else end.reason
    return Ended(
        state=end.state,
        reason=reason,
        prompt_tokens=end.prompt_tokens,
        new_tokens=end.new_tokens,
        node=end.node,
        error_code=end.error_code,
        error_message=end.error_message,
        retry_after_ms=end.retry_after_ms,
        attempts=int(end.fence.partition(".")[0] or 0),
    )


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("caller task ended", extra={"task": task.get_name()}, exc_info=error)
