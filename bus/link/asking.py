"""Following ASK: a slot on its way to another node, asked there for one command at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from bus.link.address import Endpoint, ServerAddress
from bus.link.dial import ServerInfo, dial
from bus.link.errors import LinkDown, to_server_error
from bus.link.refusal import parse_refusal
from bus.link.wire import ReplyError, Wire, pack

REFUSED = object()


class Askable:
    """A connection to the node that is importing the slot."""

    def __init__(self, wire: Wire, info: ServerInfo) -> None:
        self._wire = wire
        self._info = info
        self._replies: asyncio.Queue[Any] = asyncio.Queue()  # at most two: one command is out at a time
        wire.start(self._replies.put_nowait, self._lost, lambda: None)

    @classmethod
    @asynccontextmanager
    async def dial(cls, address: ServerAddress, endpoint: Endpoint, name: str, timeout_s: float) -> AsyncIterator[Self]:
        """Raises LinkDown or ServerError."""
        wire, info = await dial(address.at(endpoint), name=name, cell_key="", timeout_s=timeout_s)
        try:
            yield cls(wire, info)
        finally:
            await wire.release()

    async def run(self, command: bytes, timeout_s: float) -> Any:
        """The reply; an error or a lost connection as a LinkError value; REFUSED when not executed here either."""
        self._wire.write(pack(("ASKING",)) + command)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._replies.get()  # of ASKING
                if not isinstance(reply, LinkDown):
                    reply = await self._replies.get()
        except TimeoutError:
            reply = LinkDown(f"no reply from {self._info.endpoint}", maybe_sent=True)
        if isinstance(reply, ReplyError):
            return REFUSED if parse_refusal(str(reply), self._info.endpoint) else to_server_error(str(reply))
        return reply

    def _lost(self, reason: str) -> None:
        self._replies.put_nowait(LinkDown(reason, maybe_sent=True))
