"""Every way a request can fail: one code each, with the status it means and the two JSON shapes it is told in.

Pure: codes in, values out. Handlers raise `ApiError`; the middleware turns it into a response with `render`.
A client decides by the code, a retrying SDK by status, `Retry-After` and `x-should-retry`, a person by the message.
"""

import math
from dataclasses import dataclass
from typing import Final

import orjson

RETRY_AFTER_MIN_S: Final = 1
RETRY_AFTER_MAX_S: Final = 60  # openai-python does not retry at all beyond 120 s


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code means on the wire. `retry`: what x-should-retry says, where the status alone would mislead an SDK."""

    status: int
    openai_type: str
    openai_code: str | None = None  # where OpenAI has a word of its own for it
    retry: bool | None = None


INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"

KINDS: Final[dict[str, Kind]] = {
    "invalid_json": Kind(400, INVALID),
    "invalid_request": Kind(400, INVALID),
    "missing_user_address": Kind(400, INVALID),
    "context_length_exceeded": Kind(400, INVALID),
    "bad_request": Kind(400, INVALID),  # an engine or node refused the request itself
    "unsupported": Kind(400, INVALID),  # no node of the model can do what the request asks for
    "missing_api_key": Kind(401, INVALID, "invalid_api_key"),
    "invalid_api_key": Kind(401, INVALID),
    "insufficient_scope": Kind(403, "permission_error"),
    "not_owner": Kind(403, "permission_error"),
    "address_not_allowed": Kind(403, "permission_error"),
    "route_closed": Kind(403, "permission_error"),
    "not_found": Kind(404, INVALID, "unknown_url"),
    "model_not_found": Kind(404, INVALID),
    "node_not_found": Kind(404, INVALID),
    "job_not_found": Kind(404, INVALID),
    "method_not_allowed": Kind(405, INVALID),
    "registration_in_progress": Kind(409, "conflict_error"),
    "superseded": Kind(409, "conflict_error", retry=False),
    "cancelled": Kind(409, "conflict_error", retry=False),
    "taken_over": Kind(409, "conflict_error", retry=False),
    "duplicate": Kind(409, "conflict_error", retry=False),
    "body_timeout": Kind(408, INVALID, retry=False),
    "body_too_large": Kind(413, INVALID),
    "idempotency_key_reused": Kind(422, INVALID),
    "node_unhealthy": Kind(422, INVALID),
    "rate_limited": Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "queue_full": Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "quota_full": Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "internal": Kind(500, SERVER),
    "node_error": Kind(502, SERVER),
    "interrupted": Kind(502, SERVER),
    "no_node": Kind(503, SERVER, "no_workers"),
    "uncovered": Kind(503, SERVER, "no_workers"),
    "unavailable": Kind(503, SERVER, "overloaded"),
    "draining": Kind(503, SERVER, "overloaded"),
    "crashed": Kind(500, SERVER, retry=False),  # the job took several workers down: repeating it would again
    "deadline_exceeded": Kind(504, SERVER, retry=False),
    "registry_timeout": Kind(504, SERVER),
}
# Codes whose honest answer to "when again?" is at least this, when nobody computed a better one.
DEFAULT_RETRY_S: Final[dict[str, int]] = {
    "registration_in_progress": 2,
    "rate_limited": 10,
    "queue_full": 5,
    "quota_full": 5,
    "no_node": 5,
    "uncovered": 10,
    "unavailable": 2,
    "draining": 1,
    "registry_timeout": 5,
}


class ApiError(Exception):
    """A request that cannot be answered as asked. `param` names the field at fault, as the client wrote it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code if code in KINDS else "internal"
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        self.extra_headers = headers or {}

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]

    @property
    def status(self) -> int:
        return self.kind.status

    @property
    def retry_after_s(self) -> int | None:
        """Seconds, 1..60, or None where waiting does not help."""
        if self.retry_after_ms is not None and self.status in (409, 429, 503, 504):
            return retry_after_s(self.retry_after_ms)
        return DEFAULT_RETRY_S.get(self.code)


def retry_after_s(wait_ms: float) -> int:
    """Rounded up, because a client that comes back too early is refused again; capped, because SDKs give up beyond."""
    return max(RETRY_AFTER_MIN_S, min(RETRY_AFTER_MAX_S, math.ceil(wait_ms / 1000)))


def openai_error(error: ApiError) -> dict[str, object]:
    """OpenAI's envelope. `error` is always an object: a bare string crashes clients."""
    kind = error.kind
    return {
        "error": {
            "message": error.message,
            "type": kind.openai_type,
            "param": error.param,
            "code": kind.openai_code or error.code,
        }
    }


def api_error(error: ApiError) -> dict[str, object]:
    """The envelope of the /api routes."""
    inner: dict[str, object] = {"code": error.code, "message": error.message}
    if error.param is not None:
        inner["field"] = error.param
    if (wait_s := error.retry_after_s) is not None:
        inner["retry_after"] = wait_s
    return {"success": False, "error": inner}


def is_api_path(path: str) -> bool:
    return path == "/api" or path.startswith("/api/")


def render(error: ApiError, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error for a client of `path`."""
    headers = {"Content-Type": "application/json; charset=utf-8", **error.extra_headers}
    if (wait_s := error.retry_after_s) is not None:
        headers["Retry-After"] = str(wait_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="millrace"'
    if error.kind.retry is not None:
        headers["x-should-retry"] = "true" if error.kind.retry else "false"
    shape = api_error(error) if is_api_path(path) else openai_error(error)
    return error.status, headers, orjson.dumps(shape)


# What an ended job says about itself -> the code a waiting client is told. Anything else is the node's fault.
JOB_ERROR_CODES: Final[dict[str, str]] = {
    "context_length_exceeded": "context_length_exceeded",
    "bad_request": "bad_request",
    "invalid_request": "bad_request",
    "unsupported": "unsupported",
    "deadline": "deadline_exceeded",
    "deadline_exceeded": "deadline_exceeded",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
    "crash": "crashed",
    "crashed": "crashed",
    "poison": "crashed",
    "queue_full": "queue_full",
    "full": "queue_full",
    "quota_full": "quota_full",
    "no_model": "model_not_found",
    "no_node": "no_node",
    "uncovered": "uncovered",
    "shutting_down": "draining",
    "lost": "unavailable",
    "memory_full": "unavailable",
    "duplicate": "duplicate",
    "taken_over": "taken_over",
}


def job_error(code: str, message: str, retry_after_ms: int | None = None) -> ApiError:
    """The HTTP error for a job that ended in `failed` or `cancelled`."""
    return ApiError(JOB_ERROR_CODES.get(code, "node_error"), message or code, retry_after_ms=retry_after_ms or None)
