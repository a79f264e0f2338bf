"""Entries of the streams as values: what readers of out-streams, node streams, queues and `wake` get.

Every parser raises ForeignEntry with the reason for an entry that is not ours; the reader dead-letters it and goes on.
"""

from collections.abc import Callable
from typing import TypeVar

import msgspec

from bus.codec import fields as read
from bus.codec.events import ForeignEntry
from bus.codec.fields import Fields
from bus.codec.spec import parse_spec
from bus.codec.wire import TERMINAL_STATES, QueuedJob, Route, parse_route
from bus.ids import Fence, Holder, JobId
from bus.keys import QueueName

WORD_MAX = 64  # bytes of a reason, a node's id, an error code
NAME_MAX = 256  # of a gateway, a registration
DETAIL_MAX = 1 << 20
Parsed = TypeVar("Parsed")

# --- out-streams: gateway:<id> and reply:<name> ---------------------------------------------------------------------


class Marker(msgspec.Struct, frozen=True):
    """A new attempt at a job that streams begins; until the next marker only frames of this fence count."""

    job_id: JobId
    fence: Fence
    node: str
    text_len: int  # progress it starts from
    token_len: int


class Frame(msgspec.Struct, frozen=True):
    job_id: JobId
    fence: Fence
    offset: int  # UTF-8 bytes of the answer before this text
    text: bytes  # empty if only log probabilities came
    count: int  # tokens that came with it
    logprobs_at: int = 0
    logprobs: bytes | None = None  # whole records (bus.codec.logprobs) from that byte of all on; None: not asked for


class End(msgspec.Struct, frozen=True):
    """The one terminal of a job."""

    job_id: JobId
    fence: Fence
    state: str  # done | failed | cancelled; duplicate for a second entry of a plain producer
    reason: str  # stop | length | cancelled | error
    text_len: int
    prompt_tokens: int
    new_tokens: int
    node: str
    error_code: str
    error_message: str
    retry_after_ms: int
    text: bytes  # whole answer if the job did not stream and it is <= 256 KiB; else read it with Cell.text
    logprobs_len: int = 0
    logprobs: bytes | None = None  # the same for the records; None: the job does not ask for them


class Detached(msgspec.Struct, frozen=True):
    """Another gateway took the job's stream over."""

    job_id: JobId
    by: str


class Answer(msgspec.Struct, frozen=True):
    """What became of a registration that this process published."""

    id: str
    status: str
    detail: str


OutEntry = Marker | Frame | End | Detached | Answer


class Assignment(msgspec.Struct, frozen=True):
    """An entry of a node's stream: one attempt at a job."""

    entry_id: str
    job_id: JobId
    fence: Fence
    owner: Holder  # addressed to; anybody else hands it back as `unread`
    route: Route
    stream: bool
    seed: int
    deadline_ms: int
    text_len: int  # stored progress: read it with Cell.text / Cell.tokens and force it
    token_len: int  # 0 with text_len > 0: tokenise the text again; the script keeps no tokens of this attempt
    est_prompt: int
    est_new: int
    payload: bytes  # empty if > 8 KiB: read it with Cell.payload
    logprobs: bool = False  # the job asks for them


class Control(msgspec.Struct, frozen=True):
    """type: cancel (this attempt) | drain (the node; job and fence empty)."""

    type: str
    job_id: JobId
    fence: Fence


class Wake(msgspec.Struct, frozen=True):
    """Work appeared (queue and job), or capacity did (both empty). A new job brings its queue entry along."""

    queue: QueueName
    job_id: str
    head: QueuedJob | None = None


def _guarded(parse: Callable[[Fields], Parsed], fields: Fields) -> Parsed:
    try:
        return parse(fields)
    except KeyError as missing:
        raise ForeignEntry(f"field {missing} is missing") from missing
    except ValueError as error:  # UnicodeDecodeError included
        raise ForeignEntry(f"a field does not parse: {str(error)[:200]}") from error


def parse_out(fields: Fields) -> OutEntry:
    return _guarded(_parse_out, fields)


def _parse_out(fields: Fields) -> OutEntry:
    kind = fields["type"]
    if kind == b"frame":
        return Frame(
            job_id=read.job_id(fields),
            fence=read.fence(fields),
            offset=read.count(fields, "offset"),
            text=fields["text"],
            count=read.count(fields, "count"),
            logprobs_at=read.count(fields, "logprobs_at") if "logprobs" in fields else 0,
            logprobs=fields.get("logprobs"),
        )
    if kind == b"end":
        return _parse_end(fields)
    if kind == b"marker":
        return Marker(
            job_id=read.job_id(fields),
            fence=read.fence(fields),
            node=read.text(fields, "node", WORD_MAX),
            text_len=read.count(fields, "text_len"),
            token_len=read.count(fields, "token_len"),
        )
    if kind == b"detached":
        return Detached(job_id=read.job_id(fields), by=read.text(fields, "by", NAME_MAX))
    if kind == b"reply":
        return Answer(
            id=read.text(fields, "id", NAME_MAX),
            status=read.text(fields, "status", WORD_MAX),
            detail=read.text(fields, "detail", DETAIL_MAX),
        )
    raise ForeignEntry(f"type {kind[:40]!r} is unknown")


def _parse_end(fields: Fields) -> End:
    state = fields["state"].decode()
    if state not in TERMINAL_STATES:
        raise ValueError(f"state {state[:40]!r} is none that ends a job")
    return End(
        job_id=read.job_id(fields),
        fence=read.fence(fields),
        state=state,
        reason=read.text(fields, "reason", WORD_MAX),
        text_len=read.count(fields, "text_len"),
        prompt_tokens=read.count(fields, "prompt_tokens"),
        new_tokens=read.count(fields, "new_tokens"),
        node=read.text(fields, "node", WORD_MAX),
        error_code=read.text(fields, "error_code", NAME_MAX),
        error_message=fields["error_message"].decode("utf-8", "replace"),
        retry_after_ms=read.count(fields, "retry_after_ms"),
        text=fields["text"],
        logprobs_len=read.count(fields, "logprobs_len") if "logprobs" in fields else 0,
        logprobs=fields.get("logprobs"),
    )


def parse_assignment(entry_id: str, fields: Fields) -> Assignment:
    return _guarded(lambda one: _parse_assignment(entry_id, one), fields)


def _parse_assignment(entry_id: str, fields: Fields) -> Assignment:
    spec = parse_spec(fields["spec"].decode())
    return Assignment(
        entry_id=entry_id,
        job_id=read.job_id(fields),
        fence=read.fence(fields),
        owner=read.holder(fields, "owner"),
        route=_route(fields),
        stream=spec.stream,
        seed=spec.seed,
        deadline_ms=spec.deadline_ms,
        text_len=read.count(fields, "text_len"),
        token_len=read.count(fields, "token_len"),
        est_prompt=spec.est_prompt,
        est_new=spec.est_new,
        payload=fields["payload"],
        logprobs=spec.logprobs,
    )


def _route(fields: Fields) -> Route:
    route = parse_route(fields["route"].decode())
    if not read.is_out(route.out):
        raise ValueError(f"route {route.out[:40]!r} names no out-stream")
    return route


def parse_control(fields: Fields) -> Control:
    return _guarded(_parse_control, fields)


def _parse_control(fields: Fields) -> Control:
    kind = fields["type"]
    if kind == b"cancel":
        return Control("cancel", read.job_id(fields), read.fence(fields))
    if kind == b"drain":
        return Control("drain", JobId(""), Fence(""))
    raise ForeignEntry(f"type {kind[:40]!r} is unknown")


def parse_wake(fields: Fields) -> Wake:
    return _guarded(_parse_wake, fields)


def _parse_wake(fields: Fields) -> Wake:
    queue = QueueName(fields["queue"].decode())
    if not queue:
        return Wake(queue, "")
    if not read.is_queue_name(queue):
        raise ValueError(f"queue {queue[:80]!r} is none")
    job_id = read.job_id(fields)
    if "entry" not in fields:
        return Wake(queue, job_id)
    head = QueuedJob(
        read.entry_id(fields, "entry"),
        job_id,
        read.fence(fields),
        read.out(fields),
        read.count(fields, "est_prompt"),
        read.count(fields, "est_new"),
        read.moment(fields, "deadline"),
        needs=read.capabilities(fields, "needs"),
    )
    return Wake(queue, job_id, head)


def parse_queued(entry_id: str, fields: Fields) -> QueuedJob:
    return _guarded(lambda one: _parse_queued(entry_id, one), fields)


def _parse_queued(entry_id: str, fields: Fields) -> QueuedJob:
    return QueuedJob(
        entry_id=entry_id,
        job_id=read.job_id(fields),
        fence=read.fence(fields),
        out=read.out(fields),
        est_prompt=read.count(fields, "est_prompt"),
        est_new=read.count(fields, "est_new"),
        deadline_ms=read.moment(fields, "deadline"),
        alone=fields["alone"] == b"1",
        avoid=read.node_ids(fields, "avoided"),
        resume=read.digest(fields, "resume"),
        needs=read.capabilities(fields, "needs"),
        refused=read.node_ids(fields, "refused") if "refused" in fields else (),
        outgrown=read.count(fields, "outgrown") if "outgrown" in fields else None,
        begun=fields.get("begun") == b"1",
    )
