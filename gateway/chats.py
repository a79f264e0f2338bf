"""A chat from its parsed request to a followed job: the part that all chat routes share."""

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from bus.api_keys import KeyRecord
from bus.calls.caller import CallOptions, Refusal
from bus.calls.following import Ended
from bus.calls.handle import Finished, HandleEvent, JobHandle, TextDelta
from bus.chat_request import BadRequest, ParsedRequest
from bus.codec.wire import Policy
from bus.jobs import ChatJob
from gateway.bearer import parse_idempotency_key
from gateway.errors import ApiError
from gateway.jobs_wire import ended_error
from gateway.openai_wire import finish_reason
from gateway.state import CHAT_LOGGED, GATEWAY, REQUEST_ID

DEADLINE_LEAST_MS: Final = 100
Parser = Callable[[bytes, str | None], ParsedRequest]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sender:
    """Whom a job is accounted to. tenant: idempotency keys of different tenants never meet."""

    tenant: str
    key_id: str = ""
    address: str = ""
    jobs_max: int = 0


def sender_of(key: KeyRecord, address: str = "") -> Sender:
    return Sender(tenant=key.id, key_id=key.id, address=address or key.user, jobs_max=key.limits.jobs_max)


def parse_with(parser: Parser, raw: bytes, default_model: str) -> ParsedRequest:
    try:
        return parser(raw, default_model)
    except BadRequest as error:
        code = "invalid_json" if error.code == "invalid_json" else "invalid_request"
        raise ApiError(code, error.message, param=error.field) from error


def parse_policy(header: str | None, default: Policy) -> Policy:
    """`X-On-Disconnect`: what becomes of the job when its client is gone."""
    match (header or default).strip().lower():
        case "cancel":
            return "cancel"
        case "keep":
            return "keep"
        case _:
            raise ApiError("invalid_request", "`X-On-Disconnect` must be `cancel` or `keep`", param="X-On-Disconnect")


def parse_deadline_ms(header: str | None, longest_ms: int) -> int:
    """`X-Deadline-Ms`: a shorter life for the job than the setting's."""
    if header is None:
        return longest_ms
    text = header.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 12 and DEADLINE_LEAST_MS <= int(text) <= longest_ms):
        must = f"be a whole number from {DEADLINE_LEAST_MS} to {longest_ms}"
        raise ApiError("invalid_request", f"`X-Deadline-Ms` must {must}", param="X-Deadline-Ms")
    return int(text)


def refusal_error(refusal: Refusal, job: ChatJob, default_model: str) -> ApiError:
    """Why a job was not admitted, as its sender is told. The fleet's own model is never "not found", only not there."""
    match refusal.code:
        case "no_model" if job.model != default_model:
            return ApiError("model_not_found", f"the model `{job.model}` does not exist here", param="model")
        case "no_model" | "no_node":
            message = refusal.reason or f"no node serves {job.model} right now"
            return ApiError("no_node", message, retry_after_ms=refusal.retry_after_ms or None)
        case "idem_conflict":
            message = "this Idempotency-Key was used with another request body"
            return ApiError("idempotency_key_reused", message, param="Idempotency-Key")
        case "queue_full" | "quota_full" | "uncovered" | "unsupported":
            return ApiError(refusal.code, refusal.reason, retry_after_ms=refusal.retry_after_ms or None)
        case _:
            return ApiError("unavailable", refusal.reason, retry_after_ms=refusal.retry_after_ms or None)


@dataclass(slots=True)
class Course:
    """How one chat went, for its log line and the metrics. Times: seconds of `time.perf_counter`."""

    started: float = field(default_factory=time.perf_counter)
    first_text: float | None = None
    ended: Ended | None = None
    resumed: bool = False

    def note(self, event: HandleEvent | None) -> None:
        match event:
            case TextDelta() if self.first_text is None:
                self.first_text = time.perf_counter()
            case Finished():
                self.ended = event.ended

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@asynccontextmanager
async def chat(
    request: web.Request, raw: bytes, job: ChatJob, sender: Sender
) -> AsyncIterator[tuple[JobHandle, Course]]:
    """Submit, follow, and let go: however the block is left, the handle is closed and the chat accounted.

    Raises ApiError for a refusal. A client that is gone cancels the handler; its job then follows its policy.
    """
    gateway = request.app[GATEWAY]
    if gateway.life.draining:
        raise ApiError("draining", "this gateway is shutting down; ask another one", headers={"Connection": "close"})
    options = call_options(request, raw, sender, gateway.settings.job_deadline_ms)
    with gateway.life.chat():
        course = Course()
        try:
            handle = await gateway.caller.submit(job, options)
        except Refusal as refusal:
            error = refusal_error(refusal, job, gateway.settings.model)
            gateway.metrics.refused.labels(error.code).inc()
            raise error from refusal
        try:
            yield handle, course
        finally:
            handle.close()
            account(request, handle, job.model, course)


def call_options(request: web.Request, raw: bytes, sender: Sender, longest_ms: int) -> CallOptions:
    headers = request.headers
    idem_key = parse_idempotency_key(headers.get("Idempotency-Key"))
    return CallOptions(
        deadline_in_ms=parse_deadline_ms(headers.get("X-Deadline-Ms"), longest_ms),
        # A client with an idempotency key means to come again: its retry must not find the job cancelled.
        policy=parse_policy(headers.get("X-On-Disconnect"), "keep" if idem_key else "cancel"),
        tenant=sender.tenant,
        idem_key=idem_key,
        # The route belongs to the request: the same bytes mean another thing elsewhere.
        body_digest=hashlib.sha256(request.path.encode() + b"\0" + raw).hexdigest() if idem_key else "",
        address=sender.address,
        key_id=sender.key_id,
        quota_max=sender.jobs_max,
    )


def reason_of(ended: Ended | None) -> str:
    """One word of a bounded set: it is a label of the metrics."""
    if ended is None:
        return "client_gone"
    error = ended_error(ended)
    return finish_reason(ended.reason) if error is None else error.code


def account(request: web.Request, handle: JobHandle, model: str, course: Course) -> None:
    """Metrics, and the one log line of a chat."""
    metrics, ended = request.app[GATEWAY].metrics, course.ended
    request[CHAT_LOGGED] = True
    label = metrics.model_label(model)
    ttft_s = None if course.first_text is None else course.first_text - course.started
    if ttft_s is not None and not course.resumed:
        metrics.first_token.labels(label).observe(ttft_s)
    reason = reason_of(ended)
    metrics.ended.labels(label, reason).inc()
    if ended is not None and not course.resumed:
        metrics.latency.labels(label).observe(course.seconds)
        metrics.prompt_tokens.labels(label).inc(ended.prompt_tokens)
        metrics.new_tokens.labels(label).inc(ended.new_tokens)
    fields: dict[str, object] = {"request": request[REQUEST_ID], "job": handle.job_id, "model": model, "reason": reason}
    fields["ms"] = round(course.seconds * 1000, 1)
    if ttft_s is not None:
        fields["ttft_ms"] = round(ttft_s * 1000, 1)
    if ended is not None:
        fields.update(node=ended.node, tokens_in=ended.prompt_tokens, tokens_out=ended.new_tokens)
    log.info("chat ended", extra=fields)
