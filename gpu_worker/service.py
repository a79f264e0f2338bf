"""One node's service: jobs from its stream into an engine, what the engine says out through the scripts.

    NodeReader --entries--> take_jobs --requests--> Engine
                                                      | batches
    server <--flush, finish-- _send <--calls-- Publisher
      | answers                                       ^
      '------------------------------------------------'
    LeaseThread --stop, cancel, others--> on_renewed

Every rule of what to send and when is in `publisher`, every rule of when to be silent in `lease`; this file moves
things between them. A relay runs many of these over one link, one reader and one lease thread.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from bus.cell import Cell
from bus.codec.entries import Assignment, parse_assignment, parse_control
from bus.codec.events import ForeignEntry
from bus.codec.wire import FinishReply, FlushReply, NotYours, Renewed, RequeueWhy, Superseded, attempt_of
from bus.ids import Fence, Holder, JobId, NodeId
from bus.keys import WORKERS_GROUP
from bus.link import Entry, LinkDown, LinkError, to_entry
from bus.settings import Settings
from gpu_worker.answer_log import TOO_MANY
from gpu_worker.engine import End, Engine, GenerateRequest, Piece
from gpu_worker.handing_back import HandingBack
from gpu_worker.lease import LeaseThread, Tenure
from gpu_worker.publisher import Call, EngineFault, Held, Publisher
from gpu_worker.reader import NodeReader
from gpu_worker.translate import decode_payload, to_finish_piece, to_flush_piece, to_held

TICK_S = 0.25  # deadlines, kept finishes, the sign of life that the lease thread looks for
STARTED_S = 0.25  # how soon the server learns that a job was begun, so that its worker's death counts as a crash
SPARE_ROOM = 2  # read ahead of the engine, so that a freed slot is filled without a round trip
LAST_FLUSH_S = 1.0  # of a drain: for what is unsent, and for finishes to be answered

log = logging.getLogger(__name__)


class NodeGone(Exception):
    """The server has forgotten the node that was served here."""


class NodeService:
    """Serves one node until told to stop. The engine is started already and closed by its owner."""

    def __init__(
        self,
        cell: Cell,
        node: NodeId,
        holder: Holder,
        engine: Engine,
        settings: Settings,
        *,
        reader: NodeReader,
        lease: LeaseThread,
        since_ms: int,
        resumes: bool,
        context_length: int = 0,
    ) -> None:
        """since_ms: server time from which control entries are meant for this holder. resumes: has a resume digest.
        context_length: of the engine, 0 = it does not say."""
        self._cell = cell
        self._node = node
        self._holder = holder
        self._engine = engine
        self._settings = settings
        self._reader = reader
        self._lease = lease
        self._since_ms = since_ms
        self._resumes = resumes
        self._publisher = Publisher(flush_s=settings.flush_ms / 1000, keep_s=settings.finish_keep_ms / 1000)
        self._handing = HandingBack(
            cell,
            self._publisher,
            context_length=context_length,
            retry_s=settings.renew_ms / 1000,
            spawn=self._spawn,
            put_away=self._put_away,
            on_ended=self._pump,
        )
        self._tenure = Tenure(
            cell.cell,
            node,
            holder,
            settings,
            listed=self._listed,
            load=engine.load,
            deaf_s=self._deaf_s,
            on_renewed=self._on_renewed,
            on_superseded=self._fail,
            on_stalled=self._on_stalled,
        )
        self._loop = asyncio.get_running_loop()
        self._group: asyncio.TaskGroup | None = None
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._ticked_s = time.monotonic()
        self._clock_offset_ms: float | None = None  # server ms minus monotonic ms, from the last renewal
        self._run_id = cell.link.run_id
        self.draining = asyncio.Event()  # set by a drain order or by stop; beats tell it

    async def run(self, stop: asyncio.Event, farewell: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until `stop`, then drain, then say farewell while the lease still holds.

        Raises Superseded when the node belongs to another holder, NodeGone when it exists no more: everything was
        dropped. Raises EngineFault when the engine ended by itself.
        """
        self._lease.add(self._tenure)
        try:
            await self._reader.make_group(self._node)
            async with asyncio.TaskGroup() as group:
                self._group = group
                tasks = [
                    group.create_task(self._listen_to_engine(), name=f"engine of {self._node}"),
                    group.create_task(self._tick_forever(), name=f"ticks of {self._node}"),
                ]
                self._reader.add(self._node, self, since_ms=self._since_ms)
                await self._wait_for_stop(stop)
                await self._drain()
                if farewell is not None:
                    await farewell()
                for task in tasks:
                    task.cancel()
        finally:
            self._reader.remove(self._node)
            self._lease.remove(self._node)
            if self._timer is not None:
                self._timer.cancel()
            for held in self._publisher.drop_all():
                self._engine.cancel(held.sequence)

    async def _wait_for_stop(self, stop: asyncio.Event) -> None:
        stopping = self._loop.create_task(stop.wait())
        either: list[asyncio.Future[Any]] = [stopping, self._failed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._failed.done():
            self._failed.result()

    def _fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    # jobs in

    def room(self) -> int:
        if self.draining.is_set():
            return SPARE_ROOM  # entries on their way are handed back, not left to expire
        return self._engine.load().capacity + SPARE_ROOM - self._publisher.running

    async def take_jobs(self, entries: Sequence[Entry]) -> None:
        now_s = time.monotonic()
        slow: list[Assignment] = []
        for entry_id, fields in entries:
            try:
                assignment = parse_assignment(entry_id, fields)
            except ForeignEntry as error:
                await self._bury(entry_id, fields, str(error))
                continue
            sequence = f"{assignment.job_id}/{assignment.fence}"
            if assignment.owner != self._holder:
                self._spawn(self._return_unread(assignment))
            elif self._publisher.get(sequence) is not None or sequence in self._handing:
                continue  # our own pending, read again after a reconnect
            elif self._publisher.repeat_finish(sequence):
                self._pump()
            elif self.draining.is_set():
                self._handing.hand_back(to_held(assignment, now_s), "drain", "the worker is stopping")
            elif assignment.payload and not assignment.text_len:
                await self._begin(assignment, assignment.payload, b"", (), now_s)
            else:
                slow.append(assignment)
        if slow:
            await asyncio.gather(*(self._fetch_and_begin(assignment, now_s) for assignment in slow))
        if now_s - self._tenure.clock.renewed_s > STARTED_S:
            self._lease.nudge()

    async def _fetch_and_begin(self, assignment: Assignment, now_s: float) -> None:
        """Get a long payload, and the progress of earlier attempts: all of it, or without text none of its tokens."""
        job_id, fence, cell = assignment.job_id, assignment.fence, self._cell
        known = assignment.token_len if assignment.text_len else 0
        try:
            payload = assignment.payload or await cell.payload(job_id)
            text = await cell.text(job_id, fence) if assignment.text_len else b""
            tokens = await cell.tokens(job_id, fence) if known else ()
            stored = await cell.logprobs_len(job_id, fence) if assignment.logprobs and assignment.text_len else 0
        except LinkError as error:
            log.warning("job not fetched", extra={"job": job_id, "error": str(error)})
            return  # it stays pending: read again after the reconnect, or reclaimed as unread
        if payload is None or len(text) < assignment.text_len or len(tokens) < known:
            log.info("job has ended meanwhile", extra={"job": job_id, "fence": fence})
            await self._put_away(assignment.entry_id, f"{job_id} has no such payload or progress")
            return
        await self._begin(assignment, payload, text[: assignment.text_len], tokens[:known], now_s, stored)

    async def _begin(
        self,
        assignment: Assignment,
        payload: bytes,
        text: bytes,
        tokens: tuple[int, ...],
        now_s: float,
        stored_logprobs: int = 0,
    ) -> None:
        job = decode_payload(payload)
        keeps_tokens = self._resumes and (bool(tokens) or not text)
        held = to_held(assignment, now_s, text, tokens, keeps_tokens=keeps_tokens, stored_logprobs=stored_logprobs)
        self._publisher.hold(held)
        if job is None:  # no node of this release can read it: another attempt would only close more breakers
            message = "the payload is no job of this release"
            await self._bury(assignment.entry_id, {"payload": payload[:1024]}, message)
            self._publisher.end(held, End("error", error_code="bad_payload", error_message=message))
            self._pump()
            return
        self._engine.submit(
            GenerateRequest(
                sequence=held.sequence,
                job=job,
                seed=assignment.seed,
                forced_tokens=tokens,
                forced_text=text,
                deadline_ms=assignment.deadline_ms,
            )
        )

    async def take_control(self, entries: Sequence[Entry]) -> None:
        for entry_id, fields in entries:
            try:
                control = parse_control(fields)
            except ForeignEntry as error:
                await self._bury(entry_id, fields, str(error), of_control=True)
                continue
            if control.type == "drain":
                log.info("draining on order", extra={"node": self._node})
                await self._announce_drain()
            else:
                self._engine.cancel(f"{control.job_id}/{control.fence}")

    async def _put_away(self, entry_id: str, reason: str) -> None:
        """A dead letter for the entry of an attempt that the server does not know, if it is still there.

        Whatever ends or moves an attempt deletes its entry in the same script, so one that is left was never written
        by `assign`; it would stay with us, pending, for ever.
        """
        try:
            left = await self._cell.link.send("XRANGE", self._cell.keys.node_jobs(self._node), entry_id, entry_id)
        except LinkError as error:
            log.warning("entry not looked at", extra={"entry": entry_id, "error": str(error)})
            return
        for raw in left:
            await self._bury(entry_id, to_entry(raw)[1], reason)

    async def _bury(self, entry_id: str, fields: dict[str, bytes], reason: str, *, of_control: bool = False) -> None:
        """A dead letter for an entry that is not ours to understand; a job behind it lapses as unread."""
        keys = self._cell.keys
        source = keys.node_control(self._node) if of_control else keys.node_jobs(self._node)
        log.warning("foreign entry", extra={"source": source, "entry": entry_id, "reason": reason})
        try:
            await self._cell.dead_letter(source, entry_id, reason, fields, group="" if of_control else WORKERS_GROUP)
        except LinkError as error:
            log.warning("dead letter not written", extra={"entry": entry_id, "error": str(error)})

    # words out

    async def _listen_to_engine(self) -> None:
        async for batch in self._engine.batches():
            now_s = time.monotonic()
            ended = False
            for piece in batch:
                ended = self._take_piece(piece, now_s) or ended
            self._pump()
            if ended:
                self._reader.room_came(self._node)
        raise EngineFault("the engine ended by itself")

    def _take_piece(self, piece: Piece, now_s: float) -> bool:
        """Whether the piece ended its sequence."""
        try:
            held = self._publisher.add(piece, now_s)
        except EngineFault as error:
            broken = self._publisher.get(piece.sequence)
            assert broken is not None
            self._engine.cancel(piece.sequence)
            self._handing.hand_back(broken, "node_error", str(error))
            return True
        if held is not None and held.log is not None and held.log.full:
            self._refuse_rest(held)
        if piece.end is None or held is None:
            return piece.end is not None
        if piece.end.reason == "error" and (piece.end.unable or piece.end.fault == "node"):
            why: RequeueWhy = "unable" if piece.end.unable else "node_error"
            self._handing.hand_back(held, why, f"{piece.end.error_code}: {piece.end.error_message}", piece.end.lacks)
        elif held.overdue and piece.end.reason == "cancelled":
            held.end = msgspec.structs.replace(
                piece.end, reason="error", error_code="deadline_exceeded", error_message="the job's deadline has passed"
            )
        return True

    def _refuse_rest(self, held: Held) -> None:
        """More log probabilities than an answer may have."""
        if held.outgrown is not None:
            self._publisher.end(held, TOO_MANY)
        elif held.end is None:
            self._engine.cancel(held.sequence)
        else:
            held.end = TOO_MANY

    def _pump(self) -> None:
        """Send what is due, unless we must be silent; then wait for the next due time, an answer or a piece."""
        now_s = time.monotonic()
        if self._tenure.clock.is_fenced(now_s):
            return  # a renewal pumps again
        for call in self._publisher.take(now_s):
            self._spawn(self._send(call))
        self._handing.offer_stored()
        due_s = self._publisher.due_s()
        if due_s is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(due_s - now_s, 0.001), self._pump)

    async def _send(self, call: Call) -> None:
        answers: Sequence[FlushReply | FinishReply]
        try:
            if call.is_finish:
                ends = [to_finish_piece(part) for part in call.slices]
                answers = await self._cell.finish(self._holder, self._node, ends)
            else:
                pieces = [to_flush_piece(part) for part in call.slices]
                answers = await self._cell.flush(self._holder, self._node, pieces)
        except Superseded as error:
            self._fail(error)
            return
        except LinkDown as error:
            log.warning("publishing again", extra={"node": self._node, "jobs": len(call.slices), "error": str(error)})
            self._publisher.failed(call, time.monotonic())
        except LinkError as error:
            log.warning("publishing refused", extra={"node": self._node, "error": str(error)})
            self._publisher.failed(call, time.monotonic(), pause=True)
        else:
            now_s = time.monotonic()
            finished, stopped = self._publisher.answered(call, answers, now_s)
            for held in stopped:
                self._let_go(held, "")
            if finished and log.isEnabledFor(logging.INFO):
                for held in finished:
                    self._log_finished(held, now_s)
        self._pump()

    def _log_finished(self, held: Held, now_s: float) -> None:
        end = held.end
        assert end is not None
        new_tokens = max(end.new_tokens - held.start_tokens, 0)
        spent_s = max(now_s - held.asked_s, 1e-6)
        log.info(
            "job finished",
            extra={
                "job": held.job_id,
                "node": self._node,
                "attempt": attempt_of(held.fence),
                "ttft_ms": round((held.first_s - held.asked_s) * 1000, 1) if held.first_s else None,
                "tokens_in": end.prompt_tokens,
                "tokens_out": end.new_tokens,
                "tokens_s": round(new_tokens / spent_s, 1),
                "reason": end.error_code or end.reason,
            },
        )

    # what the lease says

    def _listed(self) -> list[tuple[JobId, Fence]]:
        return [*self._publisher.listed(), *self._handing.listed()]

    def _deaf_s(self) -> float:
        return max(time.monotonic() - self._ticked_s - TICK_S, self._reader.deaf_s())

    def _on_renewed(self, renewed: Renewed, asked_s: float) -> None:
        self._clock_offset_ms = renewed.expires_ms - self._settings.lease_ms - asked_s * 1000
        for sequence, why in renewed.stop.items():
            held = self._publisher.drop(sequence)
            if held is not None:
                self._let_go(held, why)
        for sequence in renewed.cancel:
            self._engine.cancel(sequence)
        for sequence in renewed.others:
            self._publisher.repeat_finish(sequence)
        self._pump()

    def _let_go(self, held: Held, why: str) -> None:
        log.info("job is no longer ours", extra={"job": held.job_id, "fence": held.fence, "why": why})
        self._engine.cancel(held.sequence)
        self._spawn(self._put_away(held.entry_id, f"{held.sequence} is no attempt of this node"))

    def on_gone(self) -> None:
        self._fail(NodeGone(f"the node {self._node} was removed"))

    def _on_stalled(self) -> None:
        self._fail(EngineFault("the engine makes no progress, a new process must take its place"))

    def on_reconnect(self) -> None:
        """The cell's link has a new connection; another run_id is a server that may have lost its last second."""
        if self._cell.link.run_id != self._run_id:
            self._run_id = self._cell.link.run_id
            repeated = self._publisher.repeat_kept()
            log.info("new server, repeating finishes", extra={"node": self._node, "finishes": repeated})
        self._pump()

    # time

    async def _tick_forever(self) -> None:
        while True:
            self._ticked_s = now_s = time.monotonic()
            self._publisher.expire(now_s)
            self._cancel_overdue(now_s)
            self._pump()
            await asyncio.sleep(TICK_S)

    def _cancel_overdue(self, now_s: float) -> None:
        if self._clock_offset_ms is None:
            return
        server_ms = now_s * 1000 + self._clock_offset_ms
        for held in self._publisher:
            if held.end is None and not held.overdue and held.deadline_ms and held.deadline_ms <= server_ms:
                held.overdue = True
                self._engine.cancel(held.sequence)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None
        self._group.create_task(work)

    async def _return_unread(self, assignment: Assignment) -> None:
        """An entry for an earlier holder of this node."""
        try:
            outcome = await self._cell.hand_back(assignment.job_id, assignment.fence, assignment.owner)
        except LinkError as error:
            log.warning("foreign job not handed back", extra={"job": assignment.job_id, "error": str(error)})
            return
        if isinstance(outcome, NotYours):
            await self._put_away(
                assignment.entry_id, f"addressed to {assignment.owner}, and the job is {outcome.state}"
            )

    async def _drain(self) -> None:
        """Take no more work, finish what can be finished within the grace, hand the rest back with all its text."""
        await self._announce_drain()
        await self._wait_until(lambda: not len(self._publisher), self._settings.drain_grace_ms / 1000)
        self._pump()
        await self._wait_until(lambda: not self._publisher.unanswered, LAST_FLUSH_S)
        for held in self._publisher:
            if held.end is None:
                self._engine.cancel(held.sequence)
                self._handing.hand_back(held, "drain", "the worker is stopping")
        await self._wait_until(lambda: not len(self._publisher) and not self._handing, LAST_FLUSH_S)

    async def _announce_drain(self) -> None:
        self.draining.set()
        try:
            await self._cell.drain_node(self._node, self._holder)
        except LinkError as error:
            log.warning("drain not announced", extra={"node": self._node, "error": str(error)})

    async def _wait_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Looks every few ms; only while stopping. A failure ends it at once."""
        end_s = time.monotonic() + timeout_s
        while not done() and time.monotonic() < end_s:
            if self._failed.done():
                self._failed.result()
            await asyncio.sleep(0.01)
