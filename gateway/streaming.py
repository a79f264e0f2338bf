"""One answer as server-sent events: from a job handle into a response, one write for all that is there.

Nothing is sent before the first text, an end, or `first_frame_wait_ms`: a failure within that time is a plain HTTP
error with its own status. After the 200 an error is an event, then [DONE]: just closing would look like a short answer.

A client that reads slowly holds nothing up: text gathers in the handle and goes out in larger pieces. One for whom more
than `sse_buffer_max` of text gathered while what was there went out, or whose socket takes nothing for WRITE_STALL_S,
is cut off; it resumes with its last event id. What was there goes out in one write, or, with log probabilities, in
many: what gathers is counted over all of them.
"""

import asyncio
import logging
from typing import Final

import orjson
from aiohttp import web

from bus.calls.following import Ended
from bus.calls.handle import Detached, Finished, HandleEvent, JobHandle, TextDelta
from gateway import sse
from gateway.chats import Course
from gateway.errors import ApiError, job_error, openai_error
from gateway.jobs_wire import ended_error, usage_of
from gateway.openai_wire import Answer, StreamShape, finish_reason
from gateway.state import GATEWAY, REQUEST_ID

WRITE_STALL_S: Final = 30.0

log = logging.getLogger(__name__)


class TooSlow(Exception):
    """The client reads more slowly than we can keep for it."""


async def stream_answer(
    request: web.Request, handle: JobHandle, answer: Answer, course: Course, *, include_usage: bool, offset: int = 0
) -> web.StreamResponse:
    """Send the whole answer from `offset` on. Raises ApiError while nothing has been sent."""
    settings = request.app[GATEWAY].settings
    first = await handle.next(settings.first_frame_wait_ms / 1000)
    course.note(first)
    if not offset and (error := error_of(first)) is not None:
        raise error
    response = web.StreamResponse(
        headers={**sse.HEADERS, "X-Request-Id": request[REQUEST_ID], "X-Job-Id": handle.job_id}
    )
    await response.prepare(request)
    events = Events(answer, include_usage=include_usage)
    try:
        await _write(response, events.opening(offset))
        await _pump(response, handle, events, course, first, settings.sse_ping_ms / 1000, settings.sse_buffer_max)
        await response.write_eof()
    except TooSlow:
        log.warning("slow client cut off", extra={"request": request[REQUEST_ID], "job": handle.job_id})
        _cut(request)
    except ConnectionError:  # gone between two writes; its handler is being cancelled
        log.info("client gone", extra={"request": request[REQUEST_ID], "job": handle.job_id})
    return response


class Events:
    """What happens to a stream, as the bytes that its client reads."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._job_id = answer.job_id
        self._id_head = f"id: {answer.job_id}.".encode()
        self._shape = StreamShape(answer, include_usage=include_usage)

    def opening(self, offset: int) -> bytes:
        """The role, once a stream; a resumed one has had it."""
        role = self._shape.role() if offset == 0 else None
        return b"" if role is None else sse.data_event(role, sse.event_id(self._job_id, 0))

    def of(self, event: HandleEvent) -> bytes:
        error = error_of(event)
        if error is not None:
            return sse.data_event(orjson.dumps(openai_error(error))) + sse.DONE
        match event:
            case TextDelta():
                if event.logprobs is None:
                    chunk = self._shape.text(event.text.decode("utf-8", "replace"))
                else:
                    chunk = self._shape.scored_text(event.text, event.offset, event.logprobs)
                return b"%b%d\ndata: %b\n\n" % (self._id_head, event.end, chunk)
            case Finished():
                return self._closing(event.ended)
            case _:
                return b""

    def _closing(self, ended: Ended) -> bytes:
        usage = self._shape.usage(usage_of(ended))
        tail = b"" if usage is None else sse.data_event(usage)
        return sse.data_event(self._shape.finish(finish_reason(ended.reason))) + tail + sse.DONE


def error_of(event: HandleEvent | None) -> ApiError | None:
    """The error that an event ends the stream with; None for all others."""
    match event:
        case Finished():
            return ended_error(event.ended)
        case Detached():
            return job_error("taken_over", "this stream was taken over by another request for the same job")
        case _:
            return None


async def _pump(
    response: web.StreamResponse,
    handle: JobHandle,
    events: Events,
    course: Course,
    event: HandleEvent | None,
    ping_s: float,
    lag_max: int,
) -> None:
    """Until the end. Raises TooSlow, ConnectionError."""
    there = handle.known  # the text that is being sent: later text has gathered meanwhile
    while True:
        piece = bytearray()
        while event is not None:
            piece += events.of(event)
            if not isinstance(event, TextDelta):
                await _write(response, piece)
                return
            # The end is often there already: it goes out in the same write.
            event = None if handle.bounded else handle.ready()
            course.note(event)
        if handle.position >= there:
            there = handle.known
        await _write(response, piece or sse.PING)
        if handle.known - there > lag_max:
            raise TooSlow
        event = (None if handle.bounded else handle.ready()) or await handle.next(ping_s)
        course.note(event)


async def _write(response: web.StreamResponse, piece: bytes | bytearray) -> None:
    if not piece:
        return
    try:
        async with asyncio.timeout(WRITE_STALL_S):
            await response.write(piece)
    except TimeoutError:
        raise TooSlow from None


def _cut(request: web.Request) -> None:
    """Close without the closing chunk, so that no client takes the part for the whole."""
    if request.transport is not None:
        request.transport.abort()
