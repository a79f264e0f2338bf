"""Entries of the streams as values: what readers of out-streams, node streams, queues and `wake` get.

Every parser raises ForeignEntry with the reason for an entry that is not ours; the reader dead-letters it and goes on.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from bus.codec.events import ForeignEntry
from bus.codec.wire import QueuedJob, Route, parse_route, parse_spec
from bus.ids import Fence, Holder, JobId, NodeId
from bus.keys import QueueName

Fields = Mapping[str, bytes]
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
    text: bytes
    count: int  # tokens that came with it


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


def _guard(parse: Callable[[], Parsed]) -> Parsed:
    try:
        return parse()
    except KeyError as missing:
        raise ForeignEntry(f"field {missing} is missing") from missing
    except ValueError as error:  # UnicodeDecodeError included
        raise ForeignEntry(f"a field does not parse: {error}") from error


def parse_out(fields: Fields) -> OutEntry:
    return _guard(lambda: _parse_out(fields))


def _parse_out(fields: Fields) -> OutEntry:
    kind = fields["type"]
    if kind == b"frame":
        return Frame(
            job_id=JobId(fields["job"].decode()),
            fence=Fence(fields["fence"].decode()),
            offset=int(fields["offset"]),
            text=fields["text"],
            count=int(fields["count"]),
        )
    if kind == b"end":
        return _parse_end(fields)
    if kind == b"marker":
        return Marker(
            job_id=JobId(fields["job"].decode()),
            fence=Fence(fields["fence"].decode()),
            node=fields["node"].decode(),
            text_len=int(fields["text_len"]),
            token_len=int(fields["token_len"]),
        )
    if kind == b"detached":
        return Detached(job_id=JobId(fields["job"].decode()), by=fields["by"].decode())
    if kind == b"reply":
        return Answer(id=fields["id"].decode(), status=fields["status"].decode(), detail=fields["detail"].decode())
    raise ForeignEntry(f"type {kind[:40]!r} is unknown")


def _parse_end(fields: Fields) -> End:
    return End(
        job_id=JobId(fields["job"].decode()),
        fence=Fence(fields["fence"].decode()),
        state=fields["state"].decode(),
        reason=fields["reason"].decode(),
        text_len=int(fields["text_len"]),
        prompt_tokens=int(fields["prompt_tokens"]),
        new_tokens=int(fields["new_tokens"]),
        node=fields["node"].decode(),
        error_code=fields["error_code"].decode(),
        error_message=fields["error_message"].decode("utf-8", "replace"),
        retry_after_ms=int(fields["retry_after_ms"]),
        text=fields["text"],
    )


def parse_assignment(entry_id: str, fields: Fields) -> Assignment:
    return _guard(lambda: _parse_assignment(entry_id, fields))


def _parse_assignment(entry_id: str, fields: Fields) -> Assignment:
    spec = parse_spec(fields["spec"].decode())
    return Assignment(
        entry_id=entry_id,
        job_id=JobId(fields["job"].decode()),
        fence=Fence(fields["fence"].decode()),
        owner=Holder(fields["owner"].decode()),
        route=parse_route(fields["route"].decode()),
        stream=spec.stream,
        seed=spec.seed,
        deadline_ms=spec.deadline_ms,
        text_len=int(fields["text_len"]),
        token_len=int(fields["token_len"]),
        est_prompt=spec.est_prompt,
        est_new=spec.est_new,
        payload=fields["payload"],
    )


def parse_control(fields: Fields) -> Control:
    control = _guard(
        lambda: Control(
            type=fields["type"].decode(),
            job_id=JobId(fields.get("job", b"").decode()),
            fence=Fence(fields.get("fence", b"").decode()),
        )
    )
    if control.type not in ("cancel", "drain"):
        raise ForeignEntry(f"type {control.type[:40]!r} is unknown")
    return control


def parse_wake(fields: Fields) -> Wake:
    return _guard(lambda: _parse_wake(fields))


def _parse_wake(fields: Fields) -> Wake:
    queue, job_id = QueueName(fields["queue"].decode()), fields["job"].decode()
    if "entry" not in fields:
        return Wake(queue, job_id)
    head = QueuedJob(
        fields["entry"].decode(),
        JobId(job_id),
        Fence(fields["fence"].decode()),
        fields["out"].decode(),
        int(fields["est_prompt"]),
        int(fields["est_new"]),
        int(fields["deadline"]),
    )
    return Wake(queue, job_id, head)


def parse_queued(entry_id: str, fields: Fields) -> QueuedJob:
    return _guard(
        lambda: QueuedJob(
            entry_id=entry_id,
            job_id=JobId(fields["job"].decode()),
            fence=Fence(fields["fence"].decode()),
            out=fields["out"].decode(),
            est_prompt=int(fields["est_prompt"]),
            est_new=int(fields["est_new"]),
            deadline_ms=int(fields["deadline"]),
            alone=fields["alone"] == b"1",
            avoid=tuple(NodeId(node) for node in fields["avoided"].decode().split()),
            resume=fields["resume"].decode(),
        )
    )
