"""The client for producers: chat through the bus, from any asyncio program that can reach the server.

    async with Client("redis://...") as client:
        answer = await client.chat("What is a millrace?")
        async for piece in client.stream("Tell me a story"):
            print(piece.text, end="")

It is a `Caller` with plain words around it: the same resume, re-drive and exactly-one-end as a gateway.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self

import msgspec
import orjson

from bus.calls.caller import Caller, CallOptions, Refusal, UnknownJob
from bus.calls.following import Ended
from bus.calls.handle import Detached, Finished, JobHandle, TextDelta
from bus.chat_request import BadRequest, parse_chat
from bus.codec.logprobs import TokenLogprobs
from bus.codec.wire import Policy
from bus.jobs import ChatJob
from bus.layout import read_layout
from bus.link import ServerAddress
from bus.settings import Settings

LAYOUT_WAIT_S = 5.0

Messages = str | Sequence[Mapping[str, Any]]


class Answer(msgspec.Struct, frozen=True):
    """A finished chat."""

    text: str
    job_id: str
    node: str
    reason: str  # stop | length
    prompt_tokens: int
    new_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None  # asked for with logprobs=True, top_logprobs=5


class Piece(msgspec.Struct, frozen=True):
    """A piece of a streamed answer. `offset` (UTF-8 bytes, after this piece) is what `resume` continues from."""

    text: str
    job_id: str
    offset: int
    node: str  # where the present attempt runs
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of the tokens that begin in this text


class ChatError(Exception):
    """The chat gave no (whole) answer. code says why, retry_after_s when to try again (None: it does not help)."""

    def __init__(self, code: str, message: str, *, job_id: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.job_id = job_id
        self.retry_after_s = retry_after_ms / 1000 if retry_after_ms else None


class Client:
    """One per process; many chats at a time. Use with `async with`, or `connect` and `close`.

    redis_url: as in the README (redis, rediss, unix, Sentinel, Cluster). model: used where a call names none.
    """

    def __init__(self, redis_url: str, *, model: str = Settings().model, settings: Settings | None = None) -> None:
        self.model = model
        self._address = ServerAddress.parse(redis_url)
        self._given = settings
        self._caller: Caller | None = None

    async def connect(self) -> Self:
        """Raises LinkDown or ServerError of `bus.link` when the server cannot be used, ChatError(`no_fleet`) when no
        fleet was ever started on it."""
        settings = await self._with_cells()
        self._caller = await Caller(self._address, settings, name="client").start()
        return self

    async def _with_cells(self) -> Settings:
        """The settings with the number of cells that the fleet has written; a fleet that just starts is waited for."""
        until = asyncio.get_running_loop().time() + LAYOUT_WAIT_S
        while (layout := await read_layout(self._address)) is None:
            if self._given is not None:
                return self._given
            if asyncio.get_running_loop().time() >= until:
                raise ChatError(
                    "no_fleet", f"no fleet has been started on {self._address} yet: start one, or correct the URL"
                )
            await asyncio.sleep(0.1)
        return (self._given or Settings()).changed(cells=layout.cells)

    async def close(self) -> None:
        if self._caller is not None:
            await self._caller.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def chat(
        self, messages: Messages, *, policy: Policy = "cancel", deadline_s: float | None = None, **options: Any
    ) -> Answer:
        """One whole answer. messages: a prompt, or OpenAI-style messages; options: max_tokens, temperature, ...

        Raises ChatError; ValueError for a request that no fleet would take.
        """
        handle = await self._submit(messages, options, stream=False, policy=policy, deadline_s=deadline_s)
        try:
            text, ended = await handle.result()
        finally:
            handle.close()
        if ended.state != "done":
            raise to_error(ended, handle.job_id)
        return Answer(
            text.decode(),
            handle.job_id,
            ended.node,
            ended.reason,
            ended.prompt_tokens,
            ended.new_tokens,
            handle.logprobs(),
        )

    async def stream(
        self, messages: Messages, *, policy: Policy = "cancel", deadline_s: float | None = None, **options: Any
    ) -> AsyncIterator[Piece]:
        """The answer as it comes. Leaving the loop early cancels the job (policy `keep`: lets it finish).

        Raises ChatError, also after the first pieces.
        """
        handle = await self._submit(messages, options, stream=True, policy=policy, deadline_s=deadline_s)
        async with aclosing(self._pieces(handle)) as pieces:
            async for piece in pieces:
                yield piece

    async def resume(self, job_id: str, offset: int = 0) -> AsyncIterator[Piece]:
        """Go on with a stream from byte `offset`, also one that another process began. Raises ChatError."""
        try:
            handle = await self._connected().attach(job_id, offset)
        except UnknownJob:
            raise ChatError("unknown_job", "no such job, or its result has expired", job_id=job_id) from None
        async with aclosing(self._pieces(handle)) as pieces:
            async for piece in pieces:
                yield piece

    async def cancel(self, job_id: str) -> None:
        """Its waiting caller gets a ChatError with code `cancelled`. Raises ChatError if there is no such job."""
        try:
            await self._connected().cancel(job_id, "client")
        except UnknownJob:
            raise ChatError("unknown_job", "no such job, or its result has expired", job_id=job_id) from None

    async def submit(self, job: ChatJob, options: CallOptions) -> JobHandle:
        """The layer below: a validated job, a handle to read. Raises Refusal."""
        return await self._connected().submit(job, options)

    async def _submit(
        self, messages: Messages, options: dict[str, Any], *, stream: bool, policy: Policy, deadline_s: float | None
    ) -> JobHandle:
        job = parse_messages(messages, {"model": self.model, **options, "stream": stream})
        deadline_in_ms = None if deadline_s is None else int(deadline_s * 1000)
        try:
            return await self._connected().submit(job, CallOptions(policy=policy, deadline_in_ms=deadline_in_ms))
        except Refusal as refusal:
            raise ChatError(refusal.code, refusal.reason, retry_after_ms=refusal.retry_after_ms) from refusal

    async def _pieces(self, handle: JobHandle) -> AsyncGenerator[Piece, None]:
        try:
            async for event in handle:
                match event:
                    case TextDelta():
                        text = event.text.decode("utf-8", "replace")
                        yield Piece(text, handle.job_id, event.end, handle.node, event.logprobs)
                    case Detached():
                        message = f"the stream was taken over by {event.by}"
                        raise ChatError("taken_over", message, job_id=handle.job_id)
                    case Finished() if event.ended.state != "done":
                        raise to_error(event.ended, handle.job_id)
        finally:
            handle.close()

    def _connected(self) -> Caller:
        if self._caller is None:
            raise RuntimeError("connect first: `async with Client(...) as client`")
        return self._caller


def parse_messages(messages: Messages, options: Mapping[str, Any]) -> ChatJob:
    """Through the same parser as every other door. Raises ValueError with the field's name."""
    asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    try:
        return parse_chat(orjson.dumps({**options, "messages": asked})).job
    except BadRequest as problem:
        raise ValueError(str(problem)) from problem


def to_error(ended: Ended, job_id: str) -> ChatError:
    code = ended.error_code or ended.reason or ended.state
    return ChatError(code, ended.error_message or code, job_id=job_id, retry_after_ms=ended.retry_after_ms)
