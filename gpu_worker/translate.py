"""Between what the bus carries and what the publisher and the engine work on: plain conversions."""

import msgspec

from bus.codec.entries import Assignment
from bus.codec.wire import FinishPiece, FlushPiece
from bus.jobs import ChatJob, decode_job
from gpu_worker.answer_log import AnswerLog
from gpu_worker.engine import End
from gpu_worker.publisher import Held, Slice


def decode_payload(payload: bytes) -> ChatJob | None:
    """None for bytes that are no job of this release."""
    try:
        return decode_job(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def to_held(
    assignment: Assignment,
    now_s: float,
    text: bytes = b"",
    tokens: tuple[int, ...] = (),
    *,
    keeps_tokens: bool = True,
    stored_logprobs: int = 0,
) -> Held:
    """stored_logprobs: bytes of them that earlier attempts stored."""
    return Held(
        assignment.job_id,
        assignment.fence,
        route=assignment.route,
        entry_id=assignment.entry_id,
        deadline_ms=assignment.deadline_ms,
        asked_s=now_s,
        forced_text=text,
        forced_tokens=tokens,
        keeps_tokens=keeps_tokens,
        log=AnswerLog(stored_logprobs) if assignment.logprobs else None,
    )


def to_flush_piece(part: Slice) -> FlushPiece:
    held = part.held
    return FlushPiece(
        held.job_id,
        held.fence,
        held.route,
        part.text_from,
        part.text,
        part.token_from,
        part.tokens,
        logprobs_offset=part.log_from,
        logprobs=part.logprobs,
    )


def to_finish_piece(part: Slice) -> FinishPiece:
    held, end = part.held, part.held.end
    assert isinstance(end, End)
    return FinishPiece(
        job_id=held.job_id,
        fence=held.fence,
        route=held.route,
        text_offset=part.text_from,
        text=part.text,
        reason=end.reason,
        prompt_tokens=end.prompt_tokens,
        new_tokens=end.new_tokens,
        error_code=end.error_code,
        error_message=end.error_message,
        fault=end.fault,
        logprobs_offset=part.log_from,
        logprobs=part.logprobs,
    )
