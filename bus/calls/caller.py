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
import contextlib
import functools
import logging
import secrets
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Self

import msgspec

from bus.calls.call import Call, must_attach
from bus.calls.following import Ended, Following
from bus.calls.handle import JobHandle
from bus.calls.outstream import OutStreams
from bus.calls.watch import CallWatch
from bus.cell import Cell
from bus.codec.entries import Answer
from bus.codec.events import NodeRegistered
from bus.codec.wire import (
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

TRY_AGAIN_CODES = frozenset({"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "UNBLOCKED"})
TRY_AGAIN_S = 0.1
RESTART_S = 1.0  # after a task of ours failed by a bug
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
        self._out_streams = OutStreams(self._calls, self._answers, self._watch, settings, self.id, self.out)

    async def start(self) -> Self:
        """Connect to every cell. Raises LinkDown or ServerError."""
        try:
            for number in range(self.settings.cells):
                await self._start_cell(number)
        except BaseException:
            await self.close()
            raise
        for cell, reader in zip(self.cells, self._readers, strict=True):
            self._keep_up(functools.partial(self._out_streams.follow, cell, reader), f"out-stream {cell.cell}")
        self._keep_up(self._watch.run, "call watch")
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
        known = self._calls.get(submission.job_id)
        if known is not None:
            return await self._follow(JobHandle(known, 0, existing=True), known, cell, stream=job.stream)
        call = self._enter(submission.job_id, _following(job), submission)
        handle = JobHandle(call, 0)
        call.asking = asyncio.get_running_loop().create_future()
        try:
            answer = await self._submit(cell, submission)
        except BaseException:
            # A retry with an idempotency key must not find the job cancelled; without one nobody could find it at all.
            handle.close(None if submission.idem_key else "cancel")
            self._abandon(call)
            raise
        finally:
            call.asking.set_result(None)
            call.asking = None
        if isinstance(answer, Refused):
            self._leave(call)
            call.following.give_up(refused_end(answer))
            call.wake()
            raise Refusal(answer.code, answer.reason, answer.retry_after_ms)
        if answer.existing or answer.job_id != call.job_id:
            return await self._follow_existing(cell, call, handle, answer)
        call.move_to("here")
        self._watch.expect_by(call, answer.deadline_ms)
        return handle

    async def attach(self, job_id: str, offset: int = 0, *, scored: bool | None = None) -> JobHandle:
        """Take a job's stream over, from byte `offset` of its answer. Raises UnknownJob, LinkDown, ServerError.

        That of a plain producer's job stays where it is; it is followed by reading what is stored. scored: whether the
        job asks for log probabilities, where the caller knows.
        """
        cell = self.cell_of_job(job_id)
        if cell is None:
            raise UnknownJob(job_id)
        if scored is None and job_id not in self._calls:  # before its text is heard, which takes its records along
            record = await cell.job(JobId(job_id))
            scored = record is not None and record.logprobs
        call = self._calls.get(job_id) or self._enter(
            JobId(job_id), Following(streamed=True, scored=bool(scored)), None
        )
        handle = JobHandle(call, offset, existing=True)
        try:
            await self._bring_here(call, cell)
        except BaseException:
            handle.close()
            self._abandon(call)
            raise
        return handle

    async def cancel(self, job_id: str, by: str) -> CancelResult:
        """Raises UnknownJob, LinkDown, ServerError. A job of this process that the server cannot be told about yet is
        cancelled as soon as it can."""
        cell = self.cell_of_job(job_id)
        if cell is None:
            raise UnknownJob(job_id)
        call = self._calls.get(job_id)
        if call is not None:
            call.cancelled_by, call.tried_at = by, asyncio.get_running_loop().time()
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
        assert job_id not in self._calls, "one Call a job: whoever comes later joins it"
        call = self._calls[job_id] = Call(job_id, following, submission, now, deadline_at)
        return call

    def _leave(self, call: Call) -> None:
        if self._calls.get(call.job_id) is call:
            del self._calls[call.job_id]

    def _abandon(self, call: Call) -> None:
        """Whoever asked for the job has gone without an answer. Others may wait for it: for them it is asked again."""
        if call.where != "asking":
            return
        if call.handles and call.submission is not None:
            call.move_to("here")
            self._watch.check_soon(call)
        elif not call.handles and call.submission is None and call.asking is None:
            self._leave(call)

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
        assert call.submission is not None
        same = msgspec.structs.replace(call.submission, job_id=answer.job_id)
        known = call
        if answer.job_id != call.job_id:
            self._leave(call)
            known = self._calls.get(answer.job_id) or self._enter(answer.job_id, _following(same.job), same)
        known.submission = known.submission or same
        if known.where == "asking" and known.asking is None:
            known.move_to("here" if answer.gateway == self.id else "elsewhere")
            self._watch.expect_by(known, answer.deadline_ms)
        follower = JobHandle(known, 0, existing=True)
        handle.close()
        return await self._follow(follower, known, cell, stream=same.job.stream)

    async def _follow(self, handle: JobHandle, call: Call, cell: Cell, *, stream: bool) -> JobHandle:
        """One more who waits for a job in the table; what cannot be asked now, the watch asks again."""
        try:
            if stream:
                with contextlib.suppress(UnknownJob, LinkError):
                    await self._bring_here(call, cell)
            elif call.asking is not None:
                await asyncio.wait((call.asking,))
            if call.where == "asking":
                call.move_to("elsewhere")
            if call.following.ended is None:
                await self._watch.check_quietly(call)
        except BaseException:
            handle.close()
            raise
        return handle

    async def _bring_here(self, call: Call, cell: Cell) -> None:
        """Have the job's frames come on our out-stream. One question at a time, however many wait for its answer; it
        goes on when one of them leaves. Raises UnknownJob, LinkError."""
        while must_attach(call):
            if call.asking is None:
                call.asking = asyncio.create_task(self._attach(call, cell), name=f"{self.id} attach {call.job_id}")
                call.asking.add_done_callback(functools.partial(_asked, call))
            await asyncio.shield(call.asking)

    async def _attach(self, call: Call, cell: Cell) -> None:
        call.following.stream()
        markers = call.following.markers
        found = await cell.attach(call.job_id, self.id, self.out)
        match found:
            case Attached():
                call.move_to("here")
                call.missing_at = None
                if call.submission is None:
                    call.policy = found.policy
                self._watch.expect_by(call, found.deadline_ms)
                if call.following.markers == markers:  # else a marker that we have heard since is the newer one
                    call.following.marker(found.fence, found.text_len)
                self._watch.settle(call)
            case JobRecord():
                await self._watch.take_record(call, cell, found, markers)
            case _:
                raise UnknownJob(call.job_id)

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
        await self._watch.renew(cell)

    def _keep_up(self, run: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Start a task that must not die: a process whose reader is dead holds its clients and is deaf."""

        async def keep_up() -> None:
            while True:
                try:
                    await run()
                except Exception:
                    log.exception("caller task failed, starting it again", extra={"task": name, "gateway": self.id})
                await asyncio.sleep(RESTART_S)
                self._watch.check_all_soon()

        self._tasks.append(asyncio.create_task(keep_up(), name=f"{self.id} {name}"))


def _following(job: ChatJob) -> Following:
    return Following(streamed=job.stream, scored=job.logprobs is not None)


def refused_end(refused: Refused) -> Ended:
    """How a refusal ends for those who had joined the job before it was answered."""
    return Ended(
        state="failed",
        reason=refused.code,
        error_code=refused.code,
        error_message=refused.reason,
        retry_after_ms=refused.retry_after_ms,
    )


def _asked(call: Call, question: asyncio.Future[None]) -> None:
    """Whoever waits for the question hears how it went; that nobody does is no error."""
    call.asking = None
    if not question.cancelled():
        question.exception()
