"""POST /v1/chat/completions and /v1/completions, streamed or whole."""

import time

from aiohttp import web
from orjson import Fragment

from bus.calls.handle import JobHandle
from bus.chat_request import parse_chat, parse_completion
from gateway.auth import limit_key, require
from gateway.body import read_body
from gateway.chats import Parser, chat, parse_with, sender_of
from gateway.jobs_wire import ended_error, usage_of
from gateway.logprobs_wire import chat_fragment, completion_fragment
from gateway.openai_wire import Answer, Endpoint, completion, finish_reason
from gateway.responses import json_response
from gateway.state import GATEWAY
from gateway.streaming import stream_answer


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, "chat", parse_chat)


async def completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, "completions", parse_completion)


async def _answer(request: web.Request, endpoint: Endpoint, parser: Parser) -> web.StreamResponse:
    key = await require(request, "chat")
    raw = await read_body(request)
    parsed = parse_with(parser, raw, request.app[GATEWAY].settings.model)
    await limit_key(request, key)
    job = parsed.job
    async with chat(request, raw, job, sender_of(key)) as (handle, course):
        answer = Answer(endpoint, handle.job_id, job.model, int(time.time()))
        if job.stream:
            return await stream_answer(request, handle, answer, course, include_usage=parsed.include_usage)
        raw_text, course.ended = await handle.result()
        if (error := ended_error(course.ended)) is not None:
            raise error
        reason, usage = finish_reason(course.ended.reason), usage_of(course.ended)
        body = completion(answer, raw_text, reason, usage, await _logprobs(endpoint, handle, raw_text))
        response = json_response(body)
        response.headers["X-Job-Id"] = handle.job_id
        response.headers["openai-processing-ms"] = str(int(course.seconds * 1000))
        return response


async def _logprobs(endpoint: Endpoint, handle: JobHandle, text: bytes) -> Fragment | None:
    if not handle.scored:
        return None
    slices = handle.logprob_slices()
    return await (chat_fragment(slices) if endpoint == "chat" else completion_fragment(slices, text))
