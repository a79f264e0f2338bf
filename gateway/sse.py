"""Server-sent events as bytes: events, ids, pings, and the ids read back. Pure.

An id is `<job>.<offset>`, the offset in UTF-8 bytes of the answer's text *after* the event, so a client that
comes back with it as `Last-Event-ID` misses nothing and sees nothing twice, on any gateway.
"""

from typing import Final

from bus.ids import JOB_ID_PATTERN, JobId

# One line, no blank line after it: openai-python (3.54) takes a blank line for an event once any id was seen, and dies
# of its empty data.
PING: Final = b": ping\n"
DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}
OFFSET_DIGITS_MAX: Final = 12


def data_event(json: bytes, event_id: bytes = b"") -> bytes:
    """One event. `json` has no line break (orjson writes none), so one data line holds it."""
    if event_id:
        return b"id: " + event_id + b"\ndata: " + json + b"\n\n"
    return b"data: " + json + b"\n\n"


def event_id(job_id: JobId, offset: int) -> bytes:
    return f"{job_id}.{offset}".encode()


def parse_event_id(text: str) -> tuple[JobId, int] | None:
    """(job, offset) of an id written by `event_id`, None for anything else. A job id may itself hold dots."""
    job_id, dot, offset = text.strip().rpartition(".")
    if not dot or len(offset) > OFFSET_DIGITS_MAX or not (offset.isascii() and offset.isdigit()):
        return None
    return (JobId(job_id), int(offset)) if JOB_ID_PATTERN.fullmatch(job_id) else None
