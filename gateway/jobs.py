"""/v1/jobs/{id}: look at a job, cancel it, or go on with its stream on any gateway."""

import asyncio
import time
from typing import Final

from aiohttp import web
from orjson import Fragment

from bus.api_keys import KeyRecord
from bus.calls.caller import UnknownJob
from bus.calls.handle import slices_of
from bus.calls.logprob_log import LogprobLog
from bus.cell import Cell
from bus.codec.wire import Cancelling, Ended, JobRecord
from bus.ids import JobId, parse_cell
from gateway.auth import require
from gateway.chats import Course, account
from gateway.errors import ApiError
from gateway.jobs_wire import job_object
from gateway.logprobs_wire import chat_fragment
from gateway.openai_wire import Answer
from gateway.responses import json_response
from gateway.sse import parse_event_id
from gateway.state import GATEWAY
from gateway.streaming import stream_answer

TRUE_WORDS: Final = ("1", "true", "yes")
ROLLBACK_BYTES: Final = 4096  # far more text than a node writes in the second that a server may lose


async def get_job(request: web.Request) -> web.Response:
    """GET /v1/jobs/{id}: state, usage, error and the text stored so far."""
    cell, record = await find_job(request, await require(request, "chat"))
    raw = await cell.text(record.job_id, record.fence)
    logprobs = await cell.logprobs(record.job_id, record.fence) if record.logprobs else None
    fragment = None if logprobs is None else await _shown(logprobs, raw[: record.text_len])
    return json_response(job_object(record, raw.decode("utf-8", "replace"), fragment))


async def _shown(logprobs: bytes, text: bytes) -> Fragment | None:
    """Stored log probabilities of a text; None where they are no records: a node wrote what it liked."""
    log = LogprobLog()
    try:
        await asyncio.to_thread(log.take, 0, logprobs)
    except ValueError:
        return None
    return await chat_fragment(slices_of(log, text))


async def cancel_job(request: web.Request) -> web.Response:
    """DELETE /v1/jobs/{id}: 200 when it has ended (perhaps earlier), 202 while its node is being told."""
    key = await require(request, "chat")
    _, record = await find_job(request, key)
    result = await request.app[GATEWAY].caller.cancel(record.job_id, by=f"key {key.id}")
    match result:
        case Ended():
            return json_response({"id": record.job_id, "object": "job", "status": result.state})
        case Cancelling():
            return json_response({"id": record.job_id, "object": "job", "status": "cancelling"}, 202)
        case _:
            raise no_such_job(record.job_id)


async def job_events(request: web.Request) -> web.StreamResponse:
    """GET /v1/jobs/{id}/events: the stream from `Last-Event-ID` on, as chat chunks. It moves to this gateway,
    but for that of a plain producer."""
    gateway = request.app[GATEWAY]
    _, record = await find_job(request, await require(request, "chat"))
    offset = parse_offset(request, record)
    include_usage = request.query.get("include_usage", "").lower() in TRUE_WORDS
    with gateway.life.chat():
        try:
            handle = await gateway.caller.attach(record.job_id, offset, scored=record.logprobs)
        except UnknownJob:
            raise no_such_job(record.job_id) from None
        course = Course(resumed=True)
        try:
            created = record.created_ms // 1000 or int(time.time())
            answer = Answer("chat", record.job_id, record.model, created)
            return await stream_answer(request, handle, answer, course, include_usage=include_usage, offset=offset)
        finally:
            handle.close()
            account(request, handle, record.model, course)


async def find_job(request: web.Request, key: KeyRecord) -> tuple[Cell, JobRecord]:
    """The job, for the key that sent it or an admin; for all others it does not exist."""
    cells = request.app[GATEWAY].caller.cells
    job_id = JobId(request.match_info["job"])
    at = parse_cell(job_id, len(cells))
    if at is None:
        raise no_such_job(job_id)
    record = await cells[at].job(job_id)
    if record is None or not may_see(record, key):
        raise no_such_job(job_id)
    return cells[at], record


def may_see(record: JobRecord, key: KeyRecord) -> bool:
    """Jobs that no key sent (a plain producer's, with ids easily guessed; the open route's) are for admins only."""
    return record.route.key_id == key.id or key.allows("admin")


def parse_offset(request: web.Request, record: JobRecord) -> int:
    """Bytes of the answer that the client has: from the header of EventSource, or `?last_event_id=`."""
    text = request.headers.get("Last-Event-ID") or request.query.get("last_event_id")
    if not text:
        return 0
    parsed = parse_event_id(text)
    if parsed is None or parsed[0] != record.job_id:
        message = "`Last-Event-ID` must be the id of an event of this job"
        raise ApiError("invalid_request", message, param="Last-Event-ID")
    offset = parsed[1]
    if is_beyond(record, offset):
        message = f"`Last-Event-ID` is beyond the {record.text_len} bytes of this answer"
        raise ApiError("invalid_request", message, param="Last-Event-ID")
    return offset


def is_beyond(record: JobRecord, offset: int) -> bool:
    """Whether no client can have read so far. A server that lost its last second may have less than it has sent."""
    if record.ended:
        return record.state == "done" and offset > record.text_len
    return offset > record.text_len + ROLLBACK_BYTES


def no_such_job(job_id: str) -> ApiError:
    return ApiError("job_not_found", f"there is no job {job_id[:128]}; ended jobs are kept for a limited time")
