"""Calls on jobs until a node has them: submit, look, assign, the front door. One script a method."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import orjson

from bus.cell.base import CellBase
from bus.cell.view import to_node_view
from bus.codec.entries import parse_queued
from bus.codec.events import ForeignEntry
from bus.codec.fields import Fields, is_queue_name
from bus.codec.spec import flags_of
from bus.codec.wire import (
    NO_FENCE,
    Accepted,
    Assigned,
    CellView,
    Ended,
    NotAssigned,
    NotYours,
    Pick,
    QueuedJob,
    QueueView,
    Refused,
    Requeued,
    Submission,
    attempt_of,
    make_fence,
    parse_route,
)
from bus.ids import Fence, JobId
from bus.jobs import encode_job, needs_of
from bus.keys import QueueName, queue_model, queue_name
from bus.link import Link, LinkClosed, LinkError, ServerError, to_entry
from bus.scripts import load_script
from bus.settings import Settings

PICKS_MAX = 64
SUBMITS_MAX = 64
PAYLOAD_INLINE_MAX = 8192  # bytes; `_create.lua` says the same
OOM_RETRY_MS = 5_000
IDEM_TRIES_MAX = 8  # each retry means that the key's job was refused and another came in between
NO_CURSORS: Mapping[QueueName, str] = {}


class _Waiting(NamedTuple):
    submission: Submission
    record: bytes
    answer: "asyncio.Future[Accepted | Refused | bytes]"  # bytes: the record of the job that has its idempotency key


class JobCalls(CellBase):
    def __init__(self, link: Link, cell: int, settings: Settings) -> None:
        super().__init__(link, cell, settings)
        self._waiting: dict[QueueName, list[_Waiting]] = {}  # submits of this turn of the loop

    async def submit(self, submission: Submission) -> Accepted | Refused:
        """Create the job, or find it: the same id again answers the existing job (`existing=True`).

        With an idem_key the record is fixed first (SET NX): if it names another id, that job is submitted or found
        instead (its id is in the answer), and another body is refused as `idem_conflict`. A refused submit deletes
        its record. OOM of the server is `Refused("memory_full")`. Raises LinkDown, ServerError; safe to repeat.
        Submits of one turn of the event loop travel in one call of the script.
        """
        if not submission.idem_key:
            answer = await self._enter(submission, b"")
            assert not isinstance(answer, bytes)
            return answer
        try:
            record = await self._fix_id(submission)
        except ServerError as error:
            return _refuse_if_full(error)
        for _ in range(IDEM_TRIES_MAX):
            owner_id, _, digest = record.decode().partition(" ")
            if digest != submission.body_digest:
                return Refused("idem_conflict", "this idempotency key was used with another request")
            if owner_id != submission.job_id:
                submission = msgspec.structs.replace(submission, job_id=JobId(owner_id))
            answer = await self._enter(submission, record)
            if not isinstance(answer, bytes):
                return answer
            record = answer
        return Refused("idem_conflict", "this idempotency key is being used by others at this moment")

    async def admit(self, entry_id: str, submission: Submission) -> Accepted | Refused | None:
        """Submit for a plain producer: acks and deletes the entry of `jobs` in the same script.

        A refusal or a duplicate is answered on the reply stream. None: the entry was gone, nothing was done.
        """
        settings = self.settings
        queue = queue_name(submission.job.model, submission.priority)
        keys, args = self._common(queue, 1)
        self._describe(submission, b"", keys, args)
        answer = await self._call(
            "admit",
            [*keys, self.keys.jobs, self.keys.dead],
            [
                *(*args, entry_id, settings.out_ttl_ms, settings.dead_keep_ms, settings.front_door_max),
                *(word for code in REASONS for word in (code, REASONS[code])),
            ],
        )
        return None if answer[0] == b"gone" else self._to_accepted(submission, answer)

    async def reject(self, entry_id: str, code: str, message: str, out: str, job_id: JobId, fields: Fields) -> bool:
        """The other end of an entry of `jobs`: dead letter, `type=end` with the error on `out` (if any), ack, delete.

        If a job of this id exists, the end says `duplicate` with its state: the job's own end is still to come, or
        has been. False: the entry was gone, nothing was done."""
        keys, settings = self.keys, self.settings
        answer = await self._call(
            "reject",
            [keys.jobs, keys.dead, keys.out(out) if out else keys.dead, keys.events, keys.job(job_id)],
            [
                *(entry_id, job_id, code, message[:500], to_evidence(fields), settings.out_ttl_ms),
                *(settings.dead_keep_ms, "1" if out else ""),
            ],
        )
        return bool(answer)

    async def look(
        self, queues: Sequence[QueueName] = (), heads: int = 64, after: Mapping[QueueName, str] = NO_CURSORS
    ) -> CellView:
        """The first `heads` entries of each queue and every known node of their models; no queue named = all.

        after: an entry id for each queue that is to be read from beyond it. Entries that are not ours are
        dead-lettered and deleted on the way. Reads only, otherwise.
        """
        keys, send = self.keys, self.link.send
        if not queues:
            names = await self.members(
                keys.queues, await send("SMEMBERS", keys.queues), is_queue_name, "no queue's name"
            )
            queues = [QueueName(name) for name in sorted(names)]
        starts = {queue: f"({after[queue]}" if queue in after else "-" for queue in queues}
        reads = [
            (send("XRANGE", keys.queue(q), start, "+", "COUNT", heads), send("XLEN", keys.queue(q)))
            for q, start in starts.items()
        ]
        models = list(dict.fromkeys(queue_model(queue) for queue in queues))
        answer = self._call("look", [keys.late], [keys.prefix, *models])
        now_ms, due_ms, *raw_nodes = await answer
        views: list[QueueView] = []
        for queue, (entries, length) in zip(starts, reads, strict=True):
            views.append(QueueView(queue, await length, tuple(await self._heads(queue, await entries, heads))))
        nodes = {view.node: view for view in map(to_node_view, raw_nodes)}
        openings = [view.breaker_until_ms for view in nodes.values() if view.breaker_until_ms > now_ms]
        dues = [*openings, *([due_ms] if due_ms > 0 else [])]
        return CellView(now_ms, tuple(views), nodes, due_ms=min(dues, default=0))

    async def assign(self, queue: QueueName, picks: Sequence[Pick]) -> list[Assigned | NotAssigned]:
        """Verify and reserve, up to 64 picks of one queue, answers in their order (longer lists are cut in calls).

        The first named node that is alive, leased, not draining, not avoided (unless all live nodes of the model that
        can do what the job asks for are), serves the model, can do that, is not kept for another job, has a closed
        breaker (or a free probe) and has room gets the job.
        """
        replies: list[Assigned | NotAssigned] = []
        for start in range(0, len(picks), PICKS_MAX):
            replies += await self._assign(queue, picks[start : start + PICKS_MAX])
        return replies

    async def end_unserved(self, job_id: JobId, fence: Fence) -> Ended | Requeued | NotYours:
        """End a queued job of whose model's nodes none can do what it asks for; NotYours if one may.

        One that outgrew its nodes is queued again for any of them where no larger context is left, and ends there.
        """
        answer = await self._change("unserved", job_id, (self.settings.node_ttl_ms,), fence)
        if answer[0] == b"returned":
            return Requeued(job_id, "outgrown", 0)
        if answer[0] == b"ended":
            return Ended(job_id, answer[1].decode(), earlier=len(answer) > 2)
        return NotYours(job_id, "unknown" if answer[0] == b"unknown" else answer[1].decode())

    async def rate(self, address: str, per_minute: int) -> int:
        """Take one request of the address' allowance: 0 = allowed, else ms to wait. per_minute 0 = no limit."""
        return int(await self._call("rate", [self.keys.rate(address)], [per_minute])) if per_minute > 0 else 0

    async def dead_letter(self, source: str, entry_id: str, reason: str, fields: Fields, *, group: str = "") -> None:
        """Put a foreign entry away: one entry in `dead`; acked (if a group is named) and deleted at `source`, a key."""
        await self._call(
            "bury",
            [self.keys.dead, source],
            [
                *(entry_id, reason[:500], to_evidence(fields), group, self.settings.dead_keep_ms),
                source.removeprefix(self.keys.prefix),
            ],
        )

    async def _fix_id(self, submission: Submission) -> bytes:
        record = f"{submission.job_id} {submission.body_digest}"
        key = self.keys.idem(submission.tenant, submission.idem_key)
        times = [submission.deadline_in_ms, submission.deadline_at_ms, self.settings.idem_extra_ms]
        answer: bytes = await self._call("idem", [key], [record, *times])
        return answer

    async def _enter(self, submission: Submission, record: bytes) -> Accepted | Refused | bytes:
        """Join the submits of this turn. bytes: the record of another job that has the idempotency key."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Accepted | Refused | bytes] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send_submits)
        queue = queue_name(submission.job.model, submission.priority)
        self._waiting.setdefault(queue, []).append(_Waiting(submission, record, answer))
        return await answer

    def _send_submits(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for queue, ones in waiting.items():
            for start in range(0, len(ones), SUBMITS_MAX):
                self._send_batch(queue, ones[start : start + SUBMITS_MAX])

    def _send_batch(self, queue: QueueName, ones: "list[_Waiting]") -> None:
        """Send, and give each caller his answer; callers who have gone meanwhile are passed over."""
        keys, args = self._common(queue, len(ones))
        for one in ones:
            self._describe(one.submission, one.record, keys, args)
        try:
            sent = self.link.script(load_script("submit"), keys, args)
        except LinkError as error:
            for one in ones:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        sent.add_done_callback(lambda done: self._settle(ones, done))

    def _settle(self, ones: "list[_Waiting]", done: asyncio.Future[Any]) -> None:
        error = LinkClosed("the link was closed") if done.cancelled() else done.exception()
        full = _full(error)
        for at, one in enumerate(ones):
            if one.answer.done():
                continue
            if error is None:
                raw = done.result()[at]
                one.answer.set_result(raw[1] if raw[0] == b"other" else self._to_accepted(one.submission, raw))
            elif full is not None:
                one.answer.set_result(full)
            else:
                one.answer.set_exception(error)

    def _common(self, queue: QueueName, count: int) -> tuple[list[str], list[str | bytes | int]]:
        """The head of KEYS and ARGV of `_create.lua`."""
        keys, settings, model = self.keys, self.settings, queue_model(queue)
        names = [
            *(keys.queue(queue), keys.wake, keys.deadlines, keys.queues, keys.model(model), keys.events),
            keys.unable(model),
        ]
        args: list[str | bytes | int] = [
            *(queue, model, keys.prefix, settings.queue_max, settings.node_ttl_ms, settings.job_keep_ms, count)
        ]
        return names, args

    def _describe(self, submission: Submission, record: bytes, names: list[str], args: list[str | bytes | int]) -> None:
        """Append one job to them."""
        s, keys = submission, self.keys
        own = keys.job(s.job_id)
        payload = encode_job(s.job)
        out, gateway_jobs, _, quota = self._route_keys(s.job_id, s.route)
        seed = s.seed if s.seed is not None else s.job.sampling.seed
        names += (own, out, gateway_jobs, quota, keys.idem(s.tenant, s.idem_key) if s.idem_key else own)
        names.append(keys.text(s.job_id, make_fence(s.attempt_floor, "r")) if s.redrive else own)
        names.append(keys.payload(s.job_id) if len(payload) > PAYLOAD_INLINE_MAX else own)
        flags = ("s" if s.job.stream else "") + flags_of(needs_of(s.job))
        args += (s.job_id, s.route.encode(), s.policy, flags)
        args += (secrets.randbits(31) if seed is None else seed, s.est_prompt, s.est_new, payload, s.deadline_in_ms)
        idem = b"%d %b" % (self.settings.idem_extra_ms, record) if record else b""
        args += (s.deadline_at_ms, s.quota_max, idem, "1" if s.redrive else "", s.attempt_floor if s.redrive else 0)
        args += (s.shown_text if s.redrive else b"", s.gateway)

    def _to_accepted(self, submission: Submission, answer: list[Any]) -> Accepted | Refused:
        match answer[0]:
            case b"new":
                fence = Fence(answer[2].decode())
                return Accepted(submission.job_id, "queued", False, int(answer[3]), fence, submission.gateway)
            case b"existing":
                gateway = parse_route(answer[4].decode()).gateway
                fence = Fence(answer[2].decode())
                return Accepted(submission.job_id, answer[1].decode(), True, int(answer[3]), fence, gateway)
            case _:
                code = answer[1].decode()
                reason = _reason(code, submission, answer[3].decode(), int(answer[4]))
                return Refused(code, reason, int(answer[2]))

    async def _heads(self, queue: QueueName, entries: list[Any], count: int) -> list[QueuedJob]:
        """Those that are ours; a page that foreign ones have thinned out is filled up from behind."""
        key = self.keys.queue(queue)
        heads: list[QueuedJob] = []
        while True:
            foreign = 0
            for entry_id, fields in map(to_entry, entries):
                try:
                    heads.append(parse_queued(entry_id, fields))
                except ForeignEntry as reason:
                    foreign += 1
                    await self.dead_letter(key, entry_id, str(reason), fields)
            if not foreign or len(entries) < count:
                return heads
            last_id = entries[-1][0].decode()
            count = foreign
            entries = await self.link.send("XRANGE", key, f"({last_id}", "+", "COUNT", count)

    async def _assign(self, queue: QueueName, picks: Sequence[Pick]) -> list[Assigned | NotAssigned]:
        replies = await self._assign_once(queue, picks)
        # An attach since the entry was written: the answer names the out-stream to declare.
        moved = {i: reply for i, reply in enumerate(replies) if isinstance(reply, str)}
        if moved:
            again = [_with_out(picks[i], out) for i, out in moved.items()]
            for i, reply in zip(moved, await self._assign_once(queue, again), strict=True):
                replies[i] = reply
        return [NotAssigned(picks[i].job_id, "changed") if isinstance(r, str) else r for i, r in enumerate(replies)]

    async def _assign_once(self, queue: QueueName, picks: Sequence[Pick]) -> list[Assigned | NotAssigned | str]:
        cell_keys, settings = self.keys, self.settings
        nodes = list(dict.fromkeys(node for pick in picks for node in pick.nodes))
        index = {node: at + 1 for at, node in enumerate(nodes)}
        keys = [cell_keys.leases, cell_keys.queue(queue)]
        for node in nodes:
            keys += (cell_keys.node(node), cell_keys.node_running(node), cell_keys.node_load(node))
            keys.append(cell_keys.node_jobs(node))
        args: list[str | bytes | int] = [
            *(cell_keys.prefix, queue_model(queue), settings.unread_ms, settings.alone_ms, settings.out_ttl_ms),
            *(settings.node_keep_ms, len(nodes)),
        ]
        args += [*nodes, len(picks)]
        for pick in picks:
            keys += (cell_keys.job(pick.job_id), cell_keys.out(pick.out))
            if pick.fence != NO_FENCE:
                fence = make_fence(attempt_of(pick.fence) + 1, pick.nonce)
                keys += (cell_keys.text(pick.job_id, pick.fence), cell_keys.tokens(pick.job_id, pick.fence))
                keys += (cell_keys.text(pick.job_id, fence), cell_keys.tokens(pick.job_id, fence))
                keys += (cell_keys.logprobs(pick.job_id, pick.fence), cell_keys.logprobs(pick.job_id, fence))
            args += (pick.entry_id, pick.job_id, pick.fence, pick.nonce, pick.out, pick.score, len(pick.nodes))
            args += [index[node] for node in pick.nodes]
        answers = await self._call("assign", keys, args)
        return [_to_assigned(pick, answer) for pick, answer in zip(picks, answers, strict=True)]


def _to_assigned(pick: Pick, answer: list[Any]) -> Assigned | NotAssigned | str:
    """A text is the out-stream that the job has moved to."""
    word = answer[0].decode()
    if word == "assigned":
        return Assigned(pick.job_id, Fence(answer[1].decode()), answer[2].decode())
    told: str = answer[1].decode() if len(answer) > 1 else ""
    return told if word == "out" else NotAssigned(pick.job_id, word, tuple(told.split()))


def _full(error: BaseException | None) -> Refused | None:
    if isinstance(error, ServerError) and error.code == "OOM":
        return Refused("memory_full", "the server's memory is full", OOM_RETRY_MS)
    return None


def _refuse_if_full(error: ServerError) -> Refused:
    full = _full(error)
    if full is None:
        raise error
    return full


def _with_out(pick: Pick, out: str) -> Pick:
    return msgspec.structs.replace(pick, out=out)


REASONS = {
    "queue_full": "{figure} jobs are waiting for {model}",
    "full": "more than {figure} entries wait at the front door",
    "no_model": "no node serves the model {model}",
    "no_node": "{figure} node(s) served the model {model}{detail}, but none is alive",
    "unsupported": "{detail}: no node that serves the model {model} can do it",
    "uncovered": "no node serves the whole model {model}, and of its {figure} layers these are uncovered: {detail}",
    "bad_reply": "the key of the reply stream holds a {detail}",
}  # `admit` says the same to a plain producer


def _reason(code: str, submission: Submission, detail: str, figure: int) -> str:
    if code == "quota_full":
        return f"{figure} jobs of this key are in flight, the limit is {submission.quota_max}"
    return REASONS.get(code, code).format(figure=figure, model=submission.job.model, detail=detail)


def to_evidence(fields: Fields) -> bytes:
    """A foreign entry's fields as JSON of at most some KiB, whatever bytes they hold."""
    readable = {name[:64]: value[:512].decode("utf-8", "backslashreplace") for name, value in list(fields.items())[:16]}
    return orjson.dumps({name.encode("utf-8", "backslashreplace").decode(): value for name, value in readable.items()})
