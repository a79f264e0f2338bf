"""One HTTP call to a node, with a bound on everything a node could do to hold us: a thin shell around `wire`.

Bounds: connect, first byte, silence between two reads, time without text, the call as a whole, bytes of the answer.
Whatever goes wrong leaves as CallFailed; CancelledError passes through and closes the connection, which is how a node
learns of a cancel. Connections are not used twice: a POST on one that the node is just closing would look like the
node's failure, and cannot be repeated blindly.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Self, TypeVar

import aiohttp

from bus.address_guard import AddressRefused
from bus.settings import Settings
from gpu_worker.relay_engine.faults import CallFailed, NodeBroke, NodeSilent, failure_of_status
from gpu_worker.relay_engine.sse import SseParser
from gpu_worker.relay_engine.wire import Chunk, NodeApi, Outgoing, read_answer, read_event, read_models, read_simple

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 16 * 1024 * 1024  # of an answer that comes as one JSON document
STREAM_BYTES_MAX = 256 * 1024 * 1024  # of a stream: chunks wrap a token in some 300 bytes
ERROR_BYTES_MAX = 64 * 1024
ERROR_BODY_S = 5.0  # of waiting for what a failed answer says; its status says enough
READ_BYTES = 64 * 1024
DETECT_S_MAX = 10.0
USAGE_S = 2.0  # from finish_reason to the usage that may follow
SIMPLE_TOKEN_S = 0.1  # a simple node sends its first byte after its last token: the bound on it grows with the tokens

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RelayLimits:
    """Seconds."""

    connect_s: float = 3.0
    first_byte_s: float = 60.0
    idle_s: float = 30.0
    total_s: float = 600.0

    @property
    def no_text_s(self) -> float:
        """Pings keep a call open while a node prefills, but not for ever."""
        return 2 * max(self.first_byte_s, self.idle_s)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            connect_s=settings.relay_connect_ms / 1000,
            first_byte_s=settings.relay_first_byte_ms / 1000,
            idle_s=settings.relay_idle_ms / 1000,
            total_s=settings.relay_total_ms / 1000,
        )


class NodeCalls:
    """The calls to one node. Holds no state of its own beside the shared session."""

    def __init__(self, session: aiohttp.ClientSession, limits: RelayLimits) -> None:
        self._session = session
        self._limits = limits

    async def detect(self, base_url: str) -> NodeApi:
        """What the node speaks: OpenAI's API if it lists its models, else the simple one. Raises CallFailed."""
        deadline = time.monotonic() + min(self._limits.first_byte_s, DETECT_S_MAX)
        url = f"{base_url}/v1/models"
        try:
            response = await self._within(deadline, self._request("GET", url), "the list of models")
            try:
                body = await self._read_whole(response, deadline, BODY_BYTES_MAX)
            finally:
                response.close()
        except (aiohttp.ClientError, OSError, AddressRefused) as error:
            raise _broke(error) from error
        if response.status == 200 and (found := read_models(base_url, body)) is not None:
            return found
        if response.status in (401, 403, 408, 429) or response.status >= 500 or 300 <= response.status < 400:
            raise failure_of_status(response.status, body)
        return NodeApi("simple", base_url)

    async def post_json(self, url: str, body: bytes, timeout_s: float) -> bytes | None:
        """A side question that may fail; None if it did."""
        deadline = time.monotonic() + timeout_s
        try:
            response = await self._within(deadline, self._request("POST", url, body), "a side question")
            try:
                return await self._read_whole(response, deadline, BODY_BYTES_MAX) if response.status == 200 else None
            finally:
                response.close()
        except (CallFailed, aiohttp.ClientError, OSError, AddressRefused) as error:
            log.debug("side question failed", extra={"url": url, "error": str(error)})
            return None

    async def chunks(self, base_url: str, outgoing: Outgoing, max_tokens: int) -> AsyncGenerator[Chunk, None]:
        """The answer, as it comes. Ends after [DONE] or at the end of the body. Raises CallFailed.

        Close it (`aclosing`) to break the call off.
        """
        limits = self._limits
        deadline = time.monotonic() + limits.total_s
        patience_s = limits.first_byte_s if outgoing.streams else limits.first_byte_s + max_tokens * SIMPLE_TOKEN_S
        first = min(deadline, time.monotonic() + patience_s)
        response: aiohttp.ClientResponse | None = None
        try:
            asked = self._request("POST", base_url + outgoing.path, outgoing.body)
            response = await self._within(first, asked, "the first byte")
            if response.status != 200:
                raise failure_of_status(response.status, await self._read_error(response, deadline))
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise NodeBroke("the node compressed its answer, which it was asked not to do")
            if not outgoing.streams:
                yield read_simple(await self._read_whole(response, first, BODY_BYTES_MAX))
            elif response.content_type == "application/json":
                yield read_answer(await self._read_whole(response, deadline, BODY_BYTES_MAX, first=first))
            else:
                async for chunk in self._events(response, first, deadline):
                    yield chunk
        except (aiohttp.ClientError, OSError, AddressRefused) as error:
            raise _broke(error) from error
        finally:
            if response is not None:
                response.close()

    async def _events(
        self, response: aiohttp.ClientResponse, first: float, deadline: float
    ) -> AsyncGenerator[Chunk, None]:
        parser = SseParser()
        received = 0
        until, what = first, "the first byte"
        finished = False
        text_until = time.monotonic() + self._limits.no_text_s
        while True:
            try:
                raw = await self._within(min(until, text_until, deadline), response.content.readany(), what)
                events = parser.feed(raw) if raw else parser.close()
                for event in events:
                    chunk = read_event(event)
                    yield chunk
                    finished = finished or bool(chunk.finish)
                    if chunk.text:
                        text_until = time.monotonic() + self._limits.no_text_s
                    if chunk.done:
                        return
            except (CallFailed, aiohttp.ClientError, OSError):
                if finished:
                    return  # the answer is whole; only its usage is missing
                raise
            if not raw:
                return
            received += len(raw)
            if received > STREAM_BYTES_MAX:
                raise NodeBroke(f"the node sent more than {STREAM_BYTES_MAX} bytes")
            patience_s = min(self._limits.idle_s, USAGE_S) if finished else self._limits.idle_s
            until, what = time.monotonic() + patience_s, "the next token"

    async def _read_error(self, response: aiohttp.ClientResponse, deadline: float) -> bytes:
        """What came of the body of a failed answer within a short time, if anything."""
        until = min(deadline, time.monotonic() + ERROR_BODY_S)
        try:
            return await self._read_whole(response, until, ERROR_BYTES_MAX, cut=True)
        except (CallFailed, aiohttp.ClientError, OSError):
            return b""

    async def _read_whole(
        self,
        response: aiohttp.ClientResponse,
        deadline: float,
        most: int,
        *,
        cut: bool = False,
        first: float | None = None,
    ) -> bytes:
        """Up to `most` bytes; more raises NodeBroke, or is cut. first: when the first of them is due.

        Between two reads no more silence is allowed than in a stream: a body that never ends would hold its slot.
        """
        body = bytearray()
        until = deadline if first is None else min(first, deadline)
        while raw := await self._within(until, response.content.read(READ_BYTES), "the answer"):
            until = min(deadline, time.monotonic() + self._limits.idle_s)
            body += raw
            if len(body) > most:
                if cut:
                    return bytes(body[:most])
                raise NodeBroke(f"the node sent more than {most} bytes")
        return bytes(body)

    async def _request(self, method: str, url: str, body: bytes | None = None) -> aiohttp.ClientResponse:
        return await self._session.request(
            method,
            url,
            data=body,
            headers={"Content-Type": "application/json"} if body is not None else None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._limits.connect_s),
        )

    async def _within(self, deadline: float, work: Awaitable[T], what: str) -> T:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await work
        except aiohttp.ServerTimeoutError as error:  # a TimeoutError too: the bound on connecting
            raise NodeSilent(f"no connection to the node within {self._limits.connect_s:g} s") from error
        except TimeoutError as error:
            raise NodeSilent(f"the node was silent: {what} did not come in time") from error


def _broke(error: Exception) -> CallFailed:
    match error:
        case CallFailed():
            return error
        case AddressRefused():
            return NodeBroke(f"the node's address is not permitted: {error}")
        case aiohttp.ClientConnectorError():
            return NodeBroke(f"no connection to the node: {type(error.os_error).__name__}")
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | ConnectionError():
            return NodeBroke("the node broke off its answer")
        case _:
            return NodeBroke(f"the call to the node failed: {type(error).__name__}")
