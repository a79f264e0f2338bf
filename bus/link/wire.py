"""One open connection: redis-py connects it, then its bytes are ours.

redis-py's `Connection` does what it does well: TCP, unix sockets, TLS, AUTH, SELECT, the client's name. For the
traffic itself, one awaited `read_response` per reply is too slow: benchmarks/link.py measures twice the CPU per command
of this module for an 8.1.0 connection pipelined by hand, and ten times for its client. So after the handshake the
transport gets this protocol instead of redis-py's stream reader, and hiredis parses replies as they arrive, without a
task in between.

This relies on one private attribute of redis-py 8.1, `Connection._writer` (an `asyncio.StreamWriter`);
tests/link/test_wire.py pins it. The Connection object is kept, because dropping it would close the socket.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

ReplyError = hiredis.ReplyError
# Its stub wants a tuple of exactly one.
pack = cast(Callable[[tuple[str | bytes | int | float, ...]], bytes], hiredis.pack_command)

_INCOMPLETE = object()


class Wire(asyncio.Protocol):
    """Hands every reply, in order, to `on_reply`; calls `on_lost` once when the connection is gone.

    Errors arrive as `ReplyError` values. Nothing is called after `close`.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        """Takes over a connected `connection` that owes no reply."""
        writer = cast(asyncio.StreamWriter, connection._writer)
        self._connection = connection
        self._transport = cast(asyncio.Transport, writer.transport)
        self._parser = hiredis.Reader(notEnoughData=_INCOMPLETE, replyError=ReplyError)
        self._on_reply: Callable[[Any], None] = _ignore
        self._on_lost: Callable[[str], None] = _ignore
        self._on_writable: Callable[[], None] = _nothing
        self.writable = True
        self.open = True
        self._transport.set_protocol(self)

    def start(
        self, on_reply: Callable[[Any], None], on_lost: Callable[[str], None], on_writable: Callable[[], None]
    ) -> None:
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._on_writable = on_writable
        if self._transport.is_closing():
            asyncio.get_running_loop().call_soon(self._lose, "closed by the server")

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        """Drop the connection now, unsent bytes included. Calls nobody back."""
        if self.open:
            self.open = False
            self._transport.abort()
        self._on_reply = _ignore
        self._on_lost = _ignore
        self._on_writable = _nothing

    async def release(self) -> None:
        """Close and let redis-py forget its side; short, never waits for the peer."""
        self.close()
        try:
            await self._connection.disconnect(nowait=True)
        except (RedisError, OSError) as error:
            log.debug("connection not released in good order", extra={"why": str(error)})

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            next_reply = self._parser.gets
            while (reply := next_reply()) is not _INCOMPLETE:
                self._on_reply(reply)
        except hiredis.ProtocolError as error:
            self._lose(f"not the Redis protocol: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(str(error) if error else "closed by the server")

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._on_writable()

    def _lose(self, reason: str) -> None:
        on_lost = self._on_lost
        self.close()
        on_lost(reason)


def _ignore(_: object) -> None:
    """Before `start` and after `close`."""


def _nothing() -> None:
    """Before `start` and after `close`."""
