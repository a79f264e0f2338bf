"""Read a request's body, within its limits of size and time."""

import asyncio
from typing import Any, Final

from aiohttp import web

from gateway.errors import ApiError
from gateway.fields import parse_json, parse_object

BODY_WAIT_S: Final = 60.0


async def read_body(request: web.Request) -> bytes:
    """Raises HTTPRequestEntityTooLarge beyond the app's `client_max_size`, ApiError when it does not arrive."""
    most = request.client_max_size
    if request.content_length is not None and most and request.content_length > most:
        # Known before the first byte: do not take megabytes in to refuse them.
        raise web.HTTPRequestEntityTooLarge(max_size=most, actual_size=request.content_length)
    try:
        async with asyncio.timeout(BODY_WAIT_S):
            return await request.read()
    except web.RequestPayloadError:
        raise ApiError("invalid_request", "the request body is cut off or not encoded as its headers say") from None
    except TimeoutError:
        raise ApiError("body_timeout", f"the request body did not arrive within {BODY_WAIT_S:g} s") from None


async def read_json(request: web.Request) -> Any:
    return parse_json(await read_body(request))


async def read_object(request: web.Request) -> dict[str, Any]:
    return parse_object(await read_body(request))
