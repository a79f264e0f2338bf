"""Around every request: its id, its log line, its count, and errors turned into the JSON of its route's family."""

import asyncio
import logging
import time
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from bus.link.errors import LinkBusy, LinkDown, LinkError, ServerError
from gateway.bearer import request_id
from gateway.errors import ApiError, render
from gateway.state import CHAT_LOGGED, GATEWAY, REQUEST_ID

QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})  # asked every second by machines

log = logging.getLogger(__name__)


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: X-Request-Id in = out (streams set it themselves before the headers go), one line, one count."""
    rid = request_id(request.headers.get("X-Request-Id"), uuid.uuid4().hex)
    request[REQUEST_ID] = rid
    started = time.perf_counter()
    status = 499  # the client went away: the handler was cancelled
    try:
        response = await handler(request)
        status = response.status
        if not response.prepared:
            response.headers["X-Request-Id"] = rid
        return response
    finally:
        _account(request, rid, status, time.perf_counter() - started)


def _account(request: web.Request, rid: str, status: int, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown"
    request.app[GATEWAY].metrics.requests.labels(request.method, route, f"{status // 100}xx").inc()
    told = CHAT_LOGGED in request or (route in QUIET_ROUTES and (status < 500 or status == 503))  # probes ask on
    level = logging.DEBUG if told else logging.INFO
    fields = {
        "request": rid,
        "method": request.method,
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    log.log(level, "request answered", extra=fields)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Exception as error:
        if isinstance(error, web.HTTPException) and error.status < 400:
            raise
        api_error = to_api_error(error, request)
        if api_error.code == "internal":
            log.exception("request failed", extra={"request": request[REQUEST_ID], "path": request.path})
        elif api_error.code == "unavailable" and request.app[GATEWAY].life.outage_is_news():
            cause = error.__cause__ or error
            log.warning("the server cannot be used", extra={"request": request[REQUEST_ID], "why": str(cause)})
        status, headers, body = render(api_error, request.path)
        return web.Response(status=status, headers=headers, body=body)


def to_api_error(error: Exception, request: web.Request) -> ApiError:
    """Whatever a handler raised, as the error its client is told. Internals stay in the log."""
    match error:
        case ApiError():
            return error
        case web.HTTPNotFound():
            return ApiError("not_found", f"there is no route {request.method} {request.path[:200]}")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed here; allowed: {allowed}"
            return ApiError("method_not_allowed", message, headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            most = request.app[GATEWAY].settings.body_max
            return ApiError("body_too_large", f"the request body is larger than the limit of {most} bytes")
        case web.HTTPException():
            return ApiError(
                "invalid_request" if error.status < 500 else "internal", error.reason or "the request failed"
            )
        case LinkDown() | LinkBusy():
            return ApiError("unavailable", "the server behind this gateway cannot be reached right now; try again")
        case ServerError() if error.code in ("OOM", "LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN"):
            return ApiError("unavailable", "the server behind this gateway takes no writes right now; try again")
        case LinkError() | asyncio.TimeoutError():
            return ApiError("unavailable", "the server behind this gateway did not answer in time; try again")
        case _:
            return ApiError("internal", "an internal error; the gateway's log has the details under this request's id")
