"""TCP proxies between a client and a real server: TLS in front, and every way a network can fail.

Both run in the test's own event loop, listen on a free loopback port, and end with their `async with`.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

CERTS = Path(__file__).parent / "certs"
CA_FILE = CERTS / "ca.pem"
CHUNK = 1 << 16


@dataclass
class FaultProxy:
    """Forwards bytes until told otherwise. What is set applies from the next byte on, to open connections too.

    swallow_reply_of = N: the Nth command from now reaches the server, is executed, and then the connection is reset
    before its reply gets through: the client cannot know. `swallowed` is set when that has happened.
    """

    target_port: int
    port: int = 0
    latency_s: float = 0.0  # added to each direction
    drop_to_server: bool = False  # black hole: taken from the client, never forwarded
    drop_to_client: bool = False
    refuse: bool = False  # new connections are reset at once
    swallow_reply_of: int | None = None
    commands: int = 0  # seen so far
    swallowed: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Break every open connection at once, both sides, without a goodbye."""
        for writer in list(self._open):
            writer.transport.abort()

    def swallow_after(self, nth: int) -> None:
        """Swallow the reply of the nth command from now (1 = the next one)."""
        self.swallowed.clear()
        self.swallow_reply_of = self.commands + nth

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        ours = {writer, server_writer}
        self._open |= ours
        mute = asyncio.Event()  # set once a command's reply is to be swallowed
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._to_server(reader, server_writer, mute))
                group.create_task(self._to_client(server_reader, writer, mute))
        except* (OSError, _OverError):
            pass
        finally:
            self._open -= ours
            for one in ours:
                one.transport.abort()

    async def _to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mute: asyncio.Event) -> None:
        splitter = CommandSplitter()
        while data := await reader.read(CHUNK):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if self.drop_to_server:
                continue
            for command in splitter.feed(data):
                self.commands += 1
                if self.commands == self.swallow_reply_of:
                    mute.set()
                writer.write(command)
                if mute.is_set():
                    break
            await writer.drain()
        raise _OverError

    async def _to_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mute: asyncio.Event) -> None:
        while data := await reader.read(CHUNK):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if mute.is_set():
                self.swallowed.set()
                raise _OverError
            if not self.drop_to_client:
                writer.write(data)
                await writer.drain()
        raise _OverError


class _OverError(Exception):
    """One side is done: so is the other."""


class CommandSplitter:
    """Cuts a stream of RESP commands (arrays of bulk strings) at their borders, as they become whole."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while (length := self._first_length()) is not None:
            command, self._buffer = self._buffer[:length], self._buffer[length:]
            yield command

    def _first_length(self) -> int | None:
        head, crlf, _ = self._buffer.partition(b"\r\n")
        if not crlf:
            return None
        assert head[:1] == b"*", f"not a RESP command: {head[:40]!r}"
        at = len(head) + 2
        for _ in range(int(head[1:])):
            end = self._buffer.find(b"\r\n", at)
            if end < 0:
                return None
            at = end + 2 + int(self._buffer[at + 1 : end]) + 2
            if at > len(self._buffer):
                return None
        return at


@asynccontextmanager
async def fault_proxy(target_port: int) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(target_port)
    async with _listening(proxy.serve) as proxy.port:
        try:
            yield proxy
        finally:
            proxy.reset()


@asynccontextmanager
async def tls_proxy(target_port: int) -> AsyncIterator[int]:
    """Terminates TLS (certificate for localhost and 127.0.0.1, signed by CA_FILE) in front of a server; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTS / "server.pem", CERTS / "server.key")
    proxy = FaultProxy(target_port)
    async with _listening(proxy.serve, context) as port:
        try:
            yield port
        finally:
            proxy.reset()


@asynccontextmanager
async def _listening(
    serve: "asyncio.streams._ClientConnectedCallback", context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    running: set[asyncio.Task[None]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await serve(reader, writer)  # type: ignore[misc]  # FaultProxy.serve is a coroutine function
        except asyncio.CancelledError:
            pass  # only ever by the end of the proxy, below
        finally:
            running.discard(task)

    server = await asyncio.start_server(tracked, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in running:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.gather(*running, return_exceptions=True)
