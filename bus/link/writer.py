"""Link: one connection, shared by everything in the process that sends commands to one cell.

    callers            send() -> future          never touch the socket; a cancelled caller abandons its future only
      |
    _queue             not written yet            bounded; each with the time until which it may wait
      | flush          all of one loop tick in one write, in order
    _sent              written, reply outstanding
      | reply          resolves the oldest
    _refused           answered "not executed" (NOSCRIPT, MOVED, ...); see refusal.py

An owner task connects, reconnects with backoff, and watches over the connection. What breaks:

  connection lost      `_sent` fails with LinkDown(maybe_sent=True): nobody knows, and the link never sends it again.
                       `_queue` waits for the next connection, up to wait_s, then LinkDown(maybe_sent=False).
  refused replies      nothing more is written until every outstanding reply is in; then the refused commands go out
                       again, in their order and before anything newer, to where the refusal says.

A script's first use on a connection sends its body (EVAL), later ones its digest; so NOSCRIPT only follows a
SCRIPT FLUSH, and then the commands in flight that are no scripts may overtake.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from bus.link.address import Endpoint, ServerAddress
from bus.link.asking import REFUSED, Askable
from bus.link.backoff import backoff_s
from bus.link.dial import ServerInfo, dial
from bus.link.errors import LinkBusy, LinkClosed, LinkDown, LinkError, ServerError, to_server_error
from bus.link.refusal import Asking, Elsewhere, Later, Refusal, Unknown, parse_refusal
from bus.link.script import Script
from bus.link.wire import ReplyError, Wire, pack

log = logging.getLogger(__name__)

Argument = str | bytes | int | float

QUEUE_MAX = 20_000  # commands waiting or unanswered
QUEUE_BYTES_MAX = 64 * 1024 * 1024
WAIT_S = 5.0  # how long a command may wait for a connection
REPLY_S = 5.0  # no reply at all for so long while one is due: the connection is dead
IDLE_S = 10.0  # a silent connection is asked for a PONG, so that a dead one is found before it is needed
TRY_AGAIN_S = 0.05
WATCH_S = 0.5


class _Command:
    """One command on its way. `data` is as sent last; `script` and `words` rebuild it with the other form."""

    __slots__ = ("data", "expires", "future", "script", "words")

    def __init__(
        self, future: asyncio.Future[Any], data: bytes, expires: float, script: Script | None, words: tuple[Any, ...]
    ) -> None:
        self.future = future
        self.data = data
        self.expires = expires  # loop time; not written by then: it fails, certainly not executed
        self.script = script
        self.words = words  # of a script: (number of keys, *keys, *args)


class Link:
    """See the module. Replies are as RESP2 has them: bytes, int, None and lists of them."""

    @classmethod
    async def connect(
        cls,
        address: ServerAddress,
        *,
        name: str,
        cell_key: str = "",
        connect_timeout_s: float = 5.0,
        wait_s: float = WAIT_S,
        reply_s: float = REPLY_S,
        idle_s: float = IDLE_S,
        queue_max: int = QUEUE_MAX,
    ) -> Self:
        """A connected link, closed by `close` or by leaving `async with`.

        name: shown in CLIENT LIST. cell_key: any key of the cell; on a cluster the link follows its slot's owner.
        Raises LinkDown when nothing fit answers within connect_timeout_s, ServerError when the login is refused.
        """
        link = cls(address, name, cell_key, connect_timeout_s, wait_s, reply_s, idle_s, queue_max)
        await link._open()
        return link

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        cell_key: str,
        connect_timeout_s: float,
        wait_s: float,
        reply_s: float,
        idle_s: float,
        queue_max: int,
    ) -> None:
        """Use `Link.connect`."""
        self.address = address
        self.name = name
        self.generation = 0  # grows at every connect
        self.run_id = ""  # of the server, read at each connect; another one: its data may be older than ours
        self.info: ServerInfo | None = None
        self.written = 0  # writes to the socket so far: round trips at most
        self.commands = 0  # commands sent so far
        self._cell_key = cell_key
        self._connect_timeout_s = connect_timeout_s
        self._wait_s = wait_s
        self._reply_s = reply_s
        self._idle_s = idle_s
        self._queue_max = queue_max
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Command] = deque()
        self._sent: deque[_Command] = deque()
        self._refused: list[tuple[_Command, Refusal, str]] = []
        self._bytes = 0  # of everything queued or unanswered
        self._flush_due = False
        self._expiry: asyncio.TimerHandle | None = None
        self._loaded: set[str] = set()  # scripts whose body this connection has sent
        self._wire: Wire | None = None
        self._progress_at = 0.0  # loop time of the last reply, or of the write that made the first one due
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._closed = False
        self._hint: Endpoint | None = None  # where a MOVED sent us
        self._callbacks: list[Callable[[], None]] = []
        self._owner: asyncio.Task[None] | None = None

    # what callers use

    @property
    def connected(self) -> bool:
        return self._wire is not None

    @property
    def waiting(self) -> int:
        """Commands queued or unanswered."""
        return len(self._queue) + len(self._sent) + len(self._refused)

    def send(self, *args: Argument) -> asyncio.Future[Any]:
        """Queue one command; it leaves with all others of this loop tick.

        The future raises ServerError, LinkDown or LinkClosed. Raises LinkBusy or LinkClosed at once.
        """
        return self._enqueue(pack(args), None, ())

    def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> asyncio.Future[Any]:
        """Queue one call of a Lua script; errors as for `send`."""
        words = (len(keys), *keys, *args)
        return self._enqueue(pack(("EVALSHA", script.sha, *words)), script, words)

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises LinkDown(maybe_sent=False) when there is no connection by then."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise LinkDown(f"{self.address} not reached within {timeout_s:g} s", maybe_sent=False) from None

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each later connect, before anything queued is sent; it may `send`."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """End the owner task and fail what is outstanding. Who wants the replies awaits them first."""
        self._closed = True
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.cancel()
            await asyncio.wait([owner], timeout=self._connect_timeout_s)
        self._fail(self._take_all(), LinkClosed("the link was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # queue and write

    def _enqueue(self, data: bytes, script: Script | None, words: tuple[Any, ...]) -> asyncio.Future[Any]:
        if self._closed:
            raise LinkClosed("the link was closed")
        if len(self._queue) + len(self._sent) >= self._queue_max or self._bytes > QUEUE_BYTES_MAX:
            raise LinkBusy(f"{self.waiting} commands ({self._bytes} bytes) wait on {self.address}")
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        self._bytes += len(data)
        self._queue.append(_Command(future, data, loop.time() + self._wait_s, script, words))
        if not self._flush_due:
            self._flush_due = True
            loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        self._flush_due = False
        wire = self._wire
        queue = self._queue
        if not queue:
            return
        if wire is None or not wire.writable or self._refused:
            self._watch_expiry()
            return
        sent = self._sent
        if not sent:
            self._progress_at = self._loop.time()
        self.commands += len(queue)
        self.written += 1
        if len(queue) == 1:
            command = queue.popleft()
            sent.append(command)
            wire.write(command.data if command.script is None else self._script_data(command))
            return
        batch = [c.data if c.script is None else self._script_data(c) for c in queue]
        sent.extend(queue)
        queue.clear()
        wire.write(b"".join(batch))

    def _script_data(self, command: _Command) -> bytes:
        """The digest if this connection has sent the body before, else the body."""
        script = command.script
        assert script is not None
        if script.sha in self._loaded:
            return command.data
        self._loaded.add(script.sha)
        return self._whole(command)

    def _watch_expiry(self) -> None:
        if self._expiry is None and self._queue:
            self._expiry = self._loop.call_at(self._queue[0].expires, self._expire)

    def _expire(self) -> None:
        """Fail what has waited too long. The queue is in order of expiry, but for resent commands at its head."""
        self._expiry = None
        now = self._loop.time()
        late = []
        while self._queue and self._queue[0].expires <= now:
            late.append(self._queue.popleft())
        if late:
            self._fail(late, LinkDown(f"no connection to {self.address} within {self._wait_s:g} s", maybe_sent=False))
        if self._queue and (self._wire is None or not self._wire.writable or self._refused):
            self._watch_expiry()

    # replies

    def _on_reply(self, reply: Any) -> None:
        self._progress_at = self._loop.time()
        if not self._sent:
            self._on_lost("a reply that nothing asked for")
            return
        command = self._sent.popleft()
        if type(reply) is ReplyError:
            self._on_error(command, str(reply))
        else:
            self._bytes -= len(command.data)
            if not command.future.done():
                command.future.set_result(reply)
        if self._refused and not self._sent:
            self._lost.set()  # every reply is in: the owner sends the refused again

    def _on_error(self, command: _Command, text: str) -> None:
        assert self.info is not None
        refusal = parse_refusal(text, self.info.endpoint)
        if refusal is None or (isinstance(refusal, Unknown) and command.script is None):
            self._settle(command, to_server_error(text))
            return
        self._refused.append((command, refusal, text))

    def _on_lost(self, reason: str) -> None:
        """The connection is gone: what was written has an unknown outcome; what was refused or queued has not run."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        wire.close()
        self._up.clear()
        log.warning("link lost", extra={"link": self.name, "server": str(self.address), "reason": reason})
        unknown = list(self._sent)
        self._sent.clear()
        self._fail(unknown, LinkDown(f"lost {self.address}: {reason}", maybe_sent=True))
        self._requeue(command for command, _, _ in self._refused)
        self._refused.clear()
        self._lost.set()
        self._watch_expiry()

    def _requeue(self, commands: Iterable[_Command]) -> None:
        self._queue.extendleft(reversed(list(commands)))
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _fail(self, commands: Iterable[_Command], error: LinkError) -> None:
        for command in commands:
            self._settle(command, error)

    def _take_all(self) -> list[_Command]:
        commands = [*self._sent, *(command for command, _, _ in self._refused), *self._queue]
        self._sent.clear()
        self._refused.clear()
        self._queue.clear()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        return commands

    # the owner task

    async def _open(self) -> None:
        """The first connect, tried again until the time is up."""
        deadline = self._loop.time() + self._connect_timeout_s
        failures = 0
        while True:
            try:
                wire = await self._dial()
                break
            except LinkDown:
                pause_s = backoff_s(failures, random.random)
                failures += 1
                if self._loop.time() + pause_s >= deadline:
                    raise
                await asyncio.sleep(pause_s)
        self._owner = asyncio.create_task(self._own(wire), name=f"link {self.name}")

    async def _dial(self) -> Wire:
        hint, self._hint = self._hint, None
        wire, self.info = await dial(
            self.address, name=self.name, cell_key=self._cell_key, timeout_s=self._connect_timeout_s, hint=hint
        )
        self.address = self.address.with_nodes(self.info.nodes)
        self._loaded.clear()
        self.run_id = self.info.run_id
        self.generation += 1
        self._lost.clear()
        self._wire = wire
        wire.start(self._on_reply, self._on_lost, self._flush)
        return wire

    async def _own(self, wire: Wire) -> None:
        """Runs as long as the link: watch the connection, and make a new one when it ends."""
        try:
            while True:
                self._up.set()
                if self.generation > 1:
                    self._tell_reconnected()
                self._flush()
                await self._watch(wire)
                self._up.clear()
                await wire.release()
                wire = await self._reconnect()
        finally:
            self._up.clear()
            closing, self._wire = self._wire, None
            unknown = list(self._sent)
            self._sent.clear()
            self._fail(unknown, LinkDown("the link was closed", maybe_sent=True))
            if closing is not None:
                await closing.release()
            if not self._closed:
                self._closed = True
                self._fail(self._take_all(), LinkClosed("the link's owner task ended"))

    def _tell_reconnected(self) -> None:
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                log.exception("reconnect callback failed", extra={"link": self.name})

    async def _reconnect(self) -> Wire:
        failures = 0
        while True:
            await asyncio.sleep(backoff_s(failures, random.random))
            try:
                wire = await self._dial()
            except LinkError as error:
                failures += 1
                level = logging.ERROR if isinstance(error, ServerError) else logging.WARNING
                log.log(level, "link not connected", extra={"link": self.name, "failures": failures, "why": str(error)})
                continue
            log.info("link connected", extra={"link": self.name, "server": str(self.address), "failures": failures})
            return wire

    async def _watch(self, wire: Wire) -> None:
        """Returns when the connection is over or must be replaced."""
        while True:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._lost.wait()
            except TimeoutError:
                self._look_after()
                continue
            self._lost.clear()
            if self._wire is None:
                return
            if await self._resume(wire):
                return

    def _look_after(self) -> None:
        silent_s = self._loop.time() - self._progress_at
        if self._sent and silent_s > self._reply_s:
            self._on_lost(f"no reply for {silent_s:.1f} s")
        elif not self._sent and not self._queue and silent_s > self._idle_s:
            self.send("PING").add_done_callback(_forget)

    async def _resume(self, wire: Wire) -> bool:
        """Deal with the refused commands, all replies being in. True: this connection must be replaced."""
        refused = self._refused
        commands = [command for command, _, _ in refused]
        first = refused[0][1]
        log.info("commands refused", extra={"link": self.name, "count": len(refused), "why": refused[0][2]})
        match first:
            case Unknown():
                self._loaded.clear()
            case Later():
                await asyncio.sleep(TRY_AGAIN_S)
            case Asking(endpoint):
                await self._ask_elsewhere(endpoint)
                commands = [command for command, _, _ in self._refused]
            case Elsewhere(endpoint):
                self._hint = endpoint
                self._wire = None
        if self._wire is None and not isinstance(first, Elsewhere):
            return True  # lost meanwhile: _on_lost has put the refused back
        self._refused = []
        self._requeue(commands)
        self._expire()
        self._flush()
        return isinstance(first, Elsewhere)

    async def _ask_elsewhere(self, endpoint: Endpoint) -> None:
        """Run the commands that got ASK at the importing node, one by one; what it refuses stays refused."""
        try:
            async with Askable.dial(self.address, endpoint, self.name, self._connect_timeout_s) as node:
                for entry in list(self._refused):
                    command, refusal, _ = entry
                    if refusal != Asking(endpoint):
                        continue
                    reply = await node.run(self._whole(command), self._reply_s)
                    if reply is not REFUSED:
                        self._refused.remove(entry)
                        self._settle(command, reply)
        except LinkError as error:
            log.warning("ASK not followed", extra={"link": self.name, "server": str(endpoint), "why": str(error)})
            await asyncio.sleep(TRY_AGAIN_S)

    def _whole(self, command: _Command) -> bytes:
        """The command as any server understands it, whatever scripts that one knows."""
        if command.script is None:
            return command.data
        return pack(("EVAL", command.script.source, *command.words))

    def _settle(self, command: _Command, reply: Any) -> None:
        self._bytes -= len(command.data)
        if command.future.done():
            return
        if isinstance(reply, LinkError):
            command.future.set_exception(reply)
        else:
            command.future.set_result(reply)


def _forget(future: asyncio.Future[Any]) -> None:
    """A PING's outcome shows in the connection, not here."""
    if not future.cancelled():
        future.exception()
