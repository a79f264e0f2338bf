"""Jobs as JSON, and how their ends are told over HTTP. Pure."""

from orjson import Fragment

from bus.calls.following import Ended
from bus.codec.wire import JobRecord
from gateway.errors import ApiError, job_error
from gateway.openai_wire import Usage


def ended_error(ended: Ended) -> ApiError | None:
    """The error that an ended job means for its caller; None if it has an answer."""
    if ended.state == "done":
        return None
    if ended.state == "cancelled":
        return job_error("cancelled", "the job was cancelled")
    return job_error(ended.error_code or ended.reason, ended.error_message, ended.retry_after_ms)


def usage_of(ended: Ended) -> Usage:
    return Usage(ended.prompt_tokens, ended.new_tokens)


def job_object(record: JobRecord, text: str | None, logprobs: Fragment | None = None) -> dict[str, object]:
    """GET /v1/jobs/{id}. text: what is stored so far, None where it was not asked for or is gone. logprobs: the JSON
    of those of that text, None where they are not asked for."""
    error = None
    if record.state in ("failed", "cancelled"):
        error = {"code": record.error_code or record.state, "message": record.error_message or record.state}
    return {
        "id": record.job_id,
        "object": "job",
        "status": record.state,
        "model": record.model,
        "created": record.created_ms // 1000,
        "deadline": record.deadline_ms // 1000,
        "ended": record.ended_ms // 1000 if record.ended_ms else None,
        "node": record.node or None,
        "text": text,
        "text_bytes": record.text_len,
        "logprobs": logprobs,
        "finish_reason": record.reason or None,
        "usage": Usage(record.prompt_tokens, record.new_tokens).to_json() if record.ended else None,
        "error": error,
        "crashes": record.crashes,
        "node_errors": record.node_errors,
    }
