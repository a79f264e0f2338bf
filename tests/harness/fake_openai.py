"""A small HTTP node that speaks OpenAI's API or the simple one, and misbehaves on demand.

In a test: `async with FakeNode(Knobs(delay_ms=5)) as node: ... node.url ... node.calls`; `node.knobs` may be changed
while it runs. By hand: `python -m tests.harness.fake_openai --port 9000 --mode openai --delay-ms 20`; the knobs of a
running one are changed with `curl -X POST localhost:9000/knobs -d '{"silent": true}'`.

Its answer is a function of the prompt alone (`answer_tokens`), so two such nodes agree and a continuation can be
checked. A token is a word with the space before it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import orjson
from aiohttp import web

SENTENCE = "the mill turns while water runs and every wheel that waits will find its grain ünder the stone 水車"
WORDS = SENTENCE.split()


@dataclasses.dataclass
class Knobs:
    """How the node behaves; each trouble is off by default. `*_at` counts tokens of one call from 0."""

    mode: Literal["openai", "simple"] = "openai"
    model: str = "fake"
    owned_by: str = "fake"  # "vllm" is one of the names a relay knows as able to continue an assistant message
    continues: bool = False  # goes on with a last assistant message instead of beginning a new one
    answer: str | None = None  # instead of the words that follow from the prompt; ends with finish_reason stop
    context_length: int = 100_000  # words
    usage: bool = True
    logprobs: bool = False  # tells them when asked: -1 for what it says, -2 for the one likeliest token beside it

    first_ms: int = 0
    delay_ms: int = 0  # before each token
    health_ms: int = 0

    silent: bool = False  # accepts, reads the request, never answers
    refuse: bool = False  # closes the connection without an answer
    status: int = 0  # answers every chat with this HTTP status
    error_message: str = "the node has a problem"
    redirect_to: str = ""
    silent_at: int | None = None  # falls silent in mid-stream
    break_at: int | None = None  # closes the connection in mid-stream
    error_at: int | None = None  # sends an SSE error event
    garbage_at: int | None = None  # sends what is no JSON
    end_at: int | None = None  # ends the body in good order, but without finish_reason and [DONE]
    huge: bool = False  # sends without end
    pings: bool = False  # sends comments for ever, and no text
    no_done: bool = False
    no_finish: bool = False
    no_models: bool = False
    models_status: int = 0
    crlf: bool = False
    chop: int = 0  # write the body in pieces of this many bytes
    ignores_stop: bool = False
    ignores_max_tokens: bool = False
    scores: Any = None  # sent as log probabilities with every token, asked for or not


def answer_tokens(prompt: str) -> Iterator[str]:
    """The endless answer to a prompt."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    for number in itertools.count():
        word = WORDS[(digest[number % 8] + number) % len(WORDS)]
        yield word if number == 0 else f" {word}"


def answer_text(prompt: str, tokens: int) -> str:
    return "".join(itertools.islice(answer_tokens(prompt), tokens))


@dataclasses.dataclass
class Call:
    """One chat call as the node saw it."""

    path: str
    body: dict[str, Any]
    tokens_sent: int = 0
    aborted: bool = False  # the caller went away before the end
    over: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # a stream ended, or was aborted

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "body": self.body, "tokens_sent": self.tokens_sent, "aborted": self.aborted}


@dataclasses.dataclass
class Plan:
    tokens: list[str]
    finish: str
    prompt_tokens: int


def _scores(token: str, chat: bool) -> dict[str, Any]:
    """In the shape of the route."""
    if not chat:
        return {"tokens": [token], "token_logprobs": [-1.0], "top_logprobs": [{token: -1.0, " or": -2.0}]}
    ones = [
        {"token": text, "logprob": value, "bytes": list(text.encode())}
        for text, value in ((token, -1.0), (" or", -2.0))
    ]
    return {"content": [{**ones[0], "top_logprobs": ones}]}


class FakeNode:
    def __init__(self, knobs: Knobs | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.calls: list[Call] = []
        self.model_lists = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> None:
        app = web.Application(client_max_size=32 * 1024 * 1024)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/chat", self._simple)
        app.router.add_post("/knobs", self._turn)
        app.router.add_get("/calls", self._list_calls)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def turn(self, **knobs: Any) -> None:
        for name, value in knobs.items():
            assert hasattr(self.knobs, name), name
            setattr(self.knobs, name, value)

    # --- what every node has --------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.knobs.health_ms / 1000)
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.model_lists += 1
        knobs = self.knobs
        if knobs.silent:
            await asyncio.sleep(3600)
        if knobs.refuse:
            return _hang_up(request)
        if knobs.models_status:
            return web.json_response({"error": {"message": "no"}}, status=knobs.models_status)
        if knobs.mode == "simple" or knobs.no_models:
            raise web.HTTPNotFound
        return web.json_response(
            {"object": "list", "data": [{"id": knobs.model, "object": "model", "owned_by": knobs.owned_by}]}
        )

    async def _turn(self, request: web.Request) -> web.Response:
        self.turn(**orjson.loads(await request.read()))
        return web.json_response(dataclasses.asdict(self.knobs))

    async def _list_calls(self, request: web.Request) -> web.Response:
        return web.json_response([call.to_json() for call in self.calls])

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.knobs.owned_by not in ("vllm", "llamacpp"):
            raise web.HTTPNotFound
        body = orjson.loads(await request.read())
        return web.json_response({"count": len(body["prompt"].split()), "tokens": []})

    # --- OpenAI -----------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.knobs.mode != "openai":
            raise web.HTTPNotFound
        body = orjson.loads(await request.read())
        call = Call(request.path, body)
        self.calls.append(call)
        trouble = await self._trouble(request)
        if trouble is not None:
            return trouble
        plan = self._plan(body)
        if plan.prompt_tokens > self.knobs.context_length:
            message = f"This model's maximum context length is {self.knobs.context_length} tokens"
            return _error(400, message, "context_length_exceeded")
        await asyncio.sleep(self.knobs.first_ms / 1000)
        if body.get("stream"):
            return await self._stream(request, call, plan, chat=request.path.endswith("chat/completions"))
        return web.json_response(self._whole(call, plan, request.path))

    def _plan(self, body: Mapping[str, Any]) -> Plan:
        """What to say: the words that follow from the last user message, after what is said already."""
        said, prompt = "", str(body.get("prompt", ""))
        if messages := body.get("messages"):
            last = messages[-1]
            continued = self.knobs.continues and last["role"] == "assistant"
            said = last["content"] if continued else ""
            prompt = next(m["content"] for m in reversed(messages) if m["role"] == "user")
            words = sum(len(m["content"].split()) for m in messages)
        else:
            prompt, said = _split_completion(prompt)
            words = len(prompt.split())
        limit = 1_000 if self.knobs.ignores_max_tokens else int(body.get("max_tokens") or 16)
        rest = self._rest(prompt, said)
        tokens = list(itertools.islice(rest, limit))
        ended = self.knobs.answer is not None and len(tokens) < limit
        tokens, stopped = (tokens, False) if self.knobs.ignores_stop else _cut(tokens, body.get("stop") or [])
        return Plan(tokens, "stop" if ended or stopped else "length", words)

    def _rest(self, prompt: str, said: str) -> Iterator[str]:
        """The tokens of the answer after the text `said`, a token that it cuts in two included."""
        spoken = 0
        size = len(said)
        for token in _split(self.knobs.answer) if self.knobs.answer is not None else answer_tokens(prompt):
            if spoken + len(token) > size:
                yield token[max(0, size - spoken) :]
            spoken += len(token)

    def _whole(self, call: Call, plan: Plan, path: str) -> dict[str, Any]:
        call.tokens_sent = len(plan.tokens)
        text = "".join(plan.tokens)
        choice: dict[str, Any] = {"index": 0, "finish_reason": plan.finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
        return {"id": "fake-1", "object": "x", "created": 1, "model": self.knobs.model, "choices": [choice]} | (
            {"usage": _usage(plan, len(plan.tokens))} if self.knobs.usage else {}
        )

    async def _stream(self, request: web.Request, call: Call, plan: Plan, *, chat: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            async with contextlib.aclosing(self._events(call, plan, chat)) as events:
                async for event in events:
                    if event is None:
                        return _hang_up(request, response)
                    await self._write(response, event)
        except (ConnectionError, asyncio.CancelledError):
            call.aborted = True
            raise
        finally:
            call.over.set()
        await response.write_eof()
        return response

    async def _events(self, call: Call, plan: Plan, chat: bool) -> AsyncGenerator[str | None, None]:
        """The body of a stream, event by event; None breaks the connection off."""
        knobs = self.knobs
        if chat:
            yield self._event({"role": "assistant", "content": ""}, chat=chat)
        yield ": a comment\n\n"
        while knobs.pings:
            await asyncio.sleep(0.05)
            yield ": ping\n\n"
        for number, token in enumerate(plan.tokens):
            await asyncio.sleep(knobs.delay_ms / 1000)
            if number == knobs.silent_at:
                await asyncio.sleep(3600)
            if number == knobs.break_at:
                yield None
            if number == knobs.error_at:
                yield f"data: {orjson.dumps({'error': {'message': knobs.error_message, 'code': 500}}).decode()}\n\n"
                return
            if number == knobs.garbage_at:
                yield "data: {not json\n\n"
                return
            if number == knobs.end_at:
                return
            scores = _scores(token, chat) if knobs.logprobs and call.body.get("logprobs") not in (None, False) else None
            yield self._event({"content": token}, chat=chat, scores=scores or knobs.scores)
            call.tokens_sent = number + 1
        while knobs.huge:
            yield self._event({"content": " more" * 2000}, chat=chat)
        if not knobs.no_finish:
            yield self._event({}, finish=plan.finish, chat=chat)
        if knobs.usage:
            yield f"data: {orjson.dumps({'choices': [], 'usage': _usage(plan, len(plan.tokens))}).decode()}\n\n"
        if not knobs.no_done:
            yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], *, finish: str | None = None, chat: bool = True, scores: Any = None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": scores}
        choice |= {"delta": delta} if chat else {"text": delta.get("content", "")}
        chunk = {"id": "fake-1", "object": "chat.completion.chunk", "model": self.knobs.model, "choices": [choice]}
        return f"data: {orjson.dumps(chunk).decode()}\n\n"

    async def _write(self, response: web.StreamResponse, event: str) -> None:
        raw = (event.replace("\n", "\r\n") if self.knobs.crlf else event).encode()
        if not self.knobs.chop:
            await response.write(raw)
            return
        for start in range(0, len(raw), self.knobs.chop):
            await response.write(raw[start : start + self.knobs.chop])
            await asyncio.sleep(0)

    # --- simple -----------------------------------------------------------------------------------------------------

    async def _simple(self, request: web.Request) -> web.StreamResponse:
        if self.knobs.mode != "simple":
            raise web.HTTPNotFound
        body = orjson.loads(await request.read())
        call = Call(request.path, body)
        self.calls.append(call)
        trouble = await self._trouble(request)
        if trouble is not None:
            return trouble
        await asyncio.sleep((self.knobs.first_ms + self.knobs.delay_ms * int(body["max_new_tokens"])) / 1000)
        if self.knobs.garbage_at is not None:
            return web.Response(text="{not json", content_type="application/json")
        if self.knobs.huge:
            return web.json_response({"response": "more " * 10_000_000})
        plan = self._plan({"prompt": body["prompt"], "max_tokens": body["max_new_tokens"]})
        call.tokens_sent = len(plan.tokens)
        return web.json_response({"response": "".join(plan.tokens)})

    async def _trouble(self, request: web.Request) -> web.StreamResponse | None:
        knobs = self.knobs
        if knobs.silent:
            await asyncio.sleep(3600)
        if knobs.refuse:
            return _hang_up(request)
        if knobs.redirect_to:
            raise web.HTTPTemporaryRedirect(knobs.redirect_to)
        if knobs.status:
            return _error(knobs.status, knobs.error_message, None)
        return None


def _split_completion(prompt: str) -> tuple[str, str]:
    """A raw prompt is everything up to its last newline; what follows was said already."""
    head, newline, said = prompt.rpartition("\n")
    return (head + newline, said) if newline else (prompt, "")


def _split(text: str) -> Iterator[str]:
    for number, word in enumerate(text.split(" ")):
        yield word if number == 0 else f" {word}"


def _cut(tokens: list[str], stop: list[str] | str) -> tuple[list[str], bool]:
    text = "".join(tokens)
    found = [at for one in ([stop] if isinstance(stop, str) else stop) if (at := text.find(one)) >= 0]
    return (list(_split(text[: min(found)])), True) if found else (tokens, False)


def _usage(plan: Plan, new: int) -> dict[str, int]:
    return {"prompt_tokens": plan.prompt_tokens, "completion_tokens": new, "total_tokens": plan.prompt_tokens + new}


def _error(status: int, message: str, code: str | None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "param": None, "code": code}}, status=status)


def _hang_up(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response if response is not None else web.Response()


def main() -> None:
    parser = argparse.ArgumentParser(prog="fake_openai", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    for knob in dataclasses.fields(Knobs):
        flag = "--" + knob.name.replace("_", "-")
        if isinstance(knob.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=knob.default)
        else:
            parser.add_argument(flag, type=int if "int" in str(knob.type) else str, default=knob.default)
    given = vars(parser.parse_args())
    port, host = given.pop("port"), given.pop("host")

    async def serve() -> None:
        node = FakeNode(Knobs(**given))
        await node.start(port, host)
        print(f"fake {node.knobs.mode} node on http://{host}:{node.port}", flush=True)
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
