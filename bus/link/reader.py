"""Reader: one connection for blocking reads, used by one task at a time.

A read never shares the writer's connection: what blocks there would hold up every caller. BLOCK is finite and the
reply is due block_ms + 3 s after the call, so a connection that died silently is found within one read.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Self

from bus.link.address import Endpoint, ServerAddress
from bus.link.backoff import backoff_s
from bus.link.dial import ServerInfo, dial
from bus.link.errors import LinkClosed, LinkDown, to_server_error
from bus.link.refusal import Asking, Elsewhere, Later, parse_refusal
from bus.link.wire import ReplyError, Wire, pack

log = logging.getLogger(__name__)

Fields = dict[str, bytes]
Entry = tuple[str, Fields]  # (entry id, fields); no fields: pending, but deleted from the stream
Batch = list[tuple[str, list[Entry]]]  # (key, its entries), only streams that had some
MayMake = Callable[[str], Awaitable[bool]]  # whether a group that is missing on this key may be made again

REPLY_GRACE_S = 3.0
NOGROUP_PAUSE_S = (0.1, 0.5)
NAMES_KEPT = 256
NAME_BYTES_KEPT = 32


class Reader:
    """Reconnects by itself; a read that meets a broken connection answers [] and `generation` has grown.

    After such a read a group's consumer must look at its own pending entries (id "0"): what the server handed out
    with the lost reply is there. While the server cannot be reached each read lasts about block_ms and answers [].
    """

    def __init__(
        self,
        address: ServerAddress,
        *,
        name: str,
        cell_key: str = "",
        connect_timeout_s: float = 5.0,
        reply_grace_s: float = REPLY_GRACE_S,
    ) -> None:
        """Nothing is connected before the first read (or `connect`)."""
        self.address = address
        self.name = name
        self.generation = 0
        self.run_id = ""
        self.info: ServerInfo | None = None
        self._cell_key = cell_key
        self._connect_timeout_s = connect_timeout_s
        self._reply_grace_s = reply_grace_s
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._reply: asyncio.Future[Any] | None = None
        self._replied_at = self._loop.time()
        self._failures = 0
        self._hint: Endpoint | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._wire is not None and self._wire.open

    @property
    def last_reply_age_s(self) -> float:
        """Seconds since the server last answered a read; far above BLOCK it means: deaf."""
        return self._loop.time() - self._replied_at

    async def connect(self) -> None:
        """Connect now. Raises LinkDown or, when the login is refused, ServerError."""
        await self._drop()
        hint, self._hint = self._hint, None
        wire, self.info = await dial(
            self.address, name=self.name, cell_key=self._cell_key, timeout_s=self._connect_timeout_s, hint=hint
        )
        if self._closed:
            await wire.release()
            raise LinkClosed("the reader was closed")
        self.address = self.address.with_nodes(self.info.nodes)
        self.run_id = self.info.run_id
        self.generation += 1
        self._failures = 0
        self._replied_at = self._loop.time()
        self._wire = wire
        wire.start(self._on_reply, self._on_lost, _nothing)

    async def xread(self, streams: Mapping[str, str | bytes], *, count: int, block_ms: int) -> Batch:
        """XREAD from the given last ids. Raises ServerError (WRONGTYPE, NOPERM ...) or LinkClosed.

        A stream that comes to exist during the read is seen; one that is added to `streams`, by the next read.
        """
        head = ("XREAD", "COUNT", count, "BLOCK", max(1, block_ms), "STREAMS")
        return await self._read(pack((*head, *streams.keys(), *streams.values())), block_ms)

    async def xreadgroup(
        self,
        group: str,
        consumer: str,
        streams: Mapping[str, str | bytes],
        *,
        count: int,
        block_ms: int,
        may_make: MayMake | None = None,
    ) -> Batch:
        """XREADGROUP; id ">" for new entries, "0" for the consumer's own pending. Errors as for `xread`.

        A missing group (after a flush or a failover) is made again from 0 MKSTREAM, after 100 to 500 ms. may_make is
        asked for each key before that; where it says no, the read answers [] and the next one should leave the key out.
        """
        head = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "BLOCK", max(1, block_ms), "STREAMS")
        command = pack((*head, *streams.keys(), *streams.values()))
        return await self._read(command, block_ms, _Groups(group, tuple(streams), may_make))

    async def close(self) -> None:
        """A read under way ends with LinkClosed."""
        self._closed = True
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(LinkClosed("the reader was closed"))
        await self._drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self, command: bytes, block_ms: int, groups: "_Groups | None" = None) -> Batch:
        deadline = self._loop.time() + block_ms / 1000
        while not self._closed:
            if not self.connected and not await self._reconnect(deadline):
                return []
            try:
                return to_batch(await self._ask(command, block_ms / 1000 + self._reply_grace_s))
            except LinkDown as error:
                log.warning("read lost", extra={"reader": self.name, "server": str(self.address), "why": str(error)})
                await self._drop()
                return []
            except _ErrorReply as error:
                again = await self._recover(error.text, groups)
                if not again or self._loop.time() >= deadline:
                    return []
        raise LinkClosed("the reader was closed")

    async def _reconnect(self, deadline: float) -> bool:
        """False: not before the deadline; at least one attempt is made."""
        while True:
            if self._failures:
                await asyncio.sleep(backoff_s(self._failures, random.random))
            try:
                await self.connect()
                return True
            except LinkDown as error:
                self._failures += 1
                extra = {"reader": self.name, "failures": self._failures, "why": str(error)}
                log.warning("reader not connected", extra=extra)
                if self._loop.time() >= deadline:
                    return False

    async def _ask(self, command: bytes, timeout_s: float) -> Any:
        """One command, its reply. A caller who gives up in between costs the connection: the reply is still due."""
        wire = self._wire
        if wire is None or not wire.open:
            raise LinkDown("not connected", maybe_sent=False)
        assert self._reply is None, "a Reader serves one task at a time"
        reply = self._reply = self._loop.create_future()
        try:
            wire.write(command)
            async with asyncio.timeout(timeout_s):
                answer = await reply
        except TimeoutError:
            wire.close()
            raise LinkDown(f"no reply for {timeout_s:.1f} s", maybe_sent=True) from None
        except asyncio.CancelledError:
            wire.close()
            raise
        finally:
            self._reply = None
        self._replied_at = self._loop.time()
        if isinstance(answer, ReplyError):
            raise _ErrorReply(str(answer))
        return answer

    async def _recover(self, text: str, groups: "_Groups | None") -> bool:
        """Make the next attempt possible, or raise what the caller must hear. None of these errors read anything.

        False: the same read again would fail as well.
        """
        assert self.info is not None
        if text.startswith("NOGROUP") and groups is not None:
            return await self._make_groups(groups)
        if text.startswith("UNBLOCKED"):  # the key's type changed, or the server is now a replica
            await self._drop()
            await asyncio.sleep(random.uniform(*NOGROUP_PAUSE_S))
            return True
        match parse_refusal(text, self.info.endpoint):
            case Elsewhere(endpoint):
                self._hint = endpoint
                self._failures += 1  # the pause before the next connect
                await self._drop()
            case Later() | Asking():  # a slot on its way: it arrives
                await asyncio.sleep(random.uniform(*NOGROUP_PAUSE_S))
            case _:
                raise to_server_error(text) from None
        return True

    async def _make_groups(self, groups: "_Groups") -> bool:
        """Whether all may exist."""
        await asyncio.sleep(random.uniform(*NOGROUP_PAUSE_S))
        all_may = True
        for key in groups.keys:
            if groups.may_make is not None and not await groups.may_make(key):
                all_may = False
                continue
            try:
                await self._ask(pack(("XGROUP", "CREATE", key, groups.name, "0", "MKSTREAM")), self._reply_grace_s)
                log.info("group made", extra={"reader": self.name, "key": key, "group": groups.name})
            except LinkDown:
                return True  # the next attempt finds out
            except _ErrorReply as error:
                if not error.text.startswith("BUSYGROUP"):
                    raise to_server_error(error.text) from None
        return all_may

    def _on_reply(self, reply: Any) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(reply)

    def _on_lost(self, reason: str) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(LinkDown(f"lost {self.address}: {reason}", maybe_sent=True))

    async def _drop(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.release()


class _Groups(NamedTuple):
    """The group that a read needs on each of its keys."""

    name: str
    keys: tuple[str, ...]
    may_make: MayMake | None


class _ErrorReply(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _Names(dict[bytes, str]):
    """Field names as str. There are a handful, so each is decoded once; a flood of foreign ones is not kept."""

    def __missing__(self, raw: bytes) -> str:
        name = raw.decode(errors="replace")
        if len(self) < NAMES_KEPT and len(raw) <= NAME_BYTES_KEPT:
            self[raw] = name
        return name


_name_of = _Names().__getitem__


def to_batch(reply: Any) -> Batch:
    """An XREAD or XREADGROUP reply (RESP2) as (key, [(id, fields)]); None (nothing came) as []."""
    return [] if reply is None else [(key.decode(), [to_entry(raw) for raw in entries]) for key, entries in reply]


def to_entry(raw: Any) -> Entry:
    """[id, [name, value, ...]] as XRANGE and XREAD give it; a pending entry that was deleted has no fields."""
    entry_id, flat = raw
    if not flat:
        return entry_id.decode(), {}
    return entry_id.decode(), dict(zip(map(_name_of, flat[::2]), flat[1::2], strict=True))


def _nothing() -> None:
    """A reader writes too little to care about a full socket."""
