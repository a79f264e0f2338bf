"""POST /api/chat/gpu (open) and /api/chat (with a key, accounted to an address): one prompt, one answer."""

from aiohttp import web

from bus.chat_request import parse_simple
from gateway.auth import limit_address, limit_key, require
from gateway.bearer import parse_user_address
from gateway.body import read_body
from gateway.chats import Sender, chat, parse_with, sender_of
from gateway.errors import ApiError
from gateway.jobs_wire import ended_error
from gateway.responses import json_response
from gateway.simple_wire import simple_answer
from gateway.state import GATEWAY


async def chat_gpu(request: web.Request) -> web.Response:
    """Without a key, as long as the operator allows it; limited per client address."""
    if not request.app[GATEWAY].settings.open_chat:
        raise ApiError("route_closed", "this route is closed here; use /api/chat with an API key")
    address = await limit_address(request)
    return await _answer(request, Sender(tenant=f"open {address}"))


async def chat_accounted(request: web.Request) -> web.Response:
    key = await require(request, "chat")
    address = parse_user_address(request.headers.get("X-User-Address"))
    await limit_key(request, key)
    return await _answer(request, sender_of(key, address))


async def _answer(request: web.Request, sender: Sender) -> web.Response:
    raw = await read_body(request)
    job = parse_with(parse_simple, raw, request.app[GATEWAY].settings.model).job
    async with chat(request, raw, job, sender) as (handle, course):
        raw_text, ended = await handle.result()
        course.ended = ended
        if (error := ended_error(ended)) is not None:
            raise error
        answer = simple_answer(
            job_id=handle.job_id,
            text=raw_text.decode("utf-8", "replace"),
            node=ended.node,
            model=job.model,
            reason=ended.reason,
            prompt_tokens=ended.prompt_tokens,
            new_tokens=ended.new_tokens,
            seconds=course.seconds,
        )
        response = json_response(answer)
        response.headers["X-Job-Id"] = handle.job_id
        return response
