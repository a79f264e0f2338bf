"""The commands of one link between their callers and the socket: what waits, what is out, what was refused.

    queue      not written yet            bounded; each with the time until which it may wait
      | flush          all of one loop tick in one write, in order
    sent       written, reply outstanding
      | reply          resolves the oldest
    refused    answered "not executed" (NOSCRIPT, MOVED, ...); see refusal.py

Once a reply is a refusal nothing more is written until every outstanding reply is in; then the link decides where the
refused commands go (`put_back`), in their order and before anything newer.

A script's first use on a connection sends its body (EVAL), later ones its digest; so NOSCRIPT only follows a
SCRIPT FLUSH, and then the commands in flight that are no scripts may overtake.

No task and no connecting here: the link hands a wire in and hears of trouble through `trouble`.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from bus.link.address import Endpoint
from bus.link.errors import LinkBusy, LinkDown, LinkError, to_server_error
from bus.link.refusal import Refusal, Unknown, parse_refusal
from bus.link.script import Script
from bus.link.wire import ReplyError, Wire, pack

BYTES_MAX = 64 * 1024 * 1024


class Command:
    """One command on its way. `data` is its usual form; `script` and `words` make the other one."""

    __slots__ = ("data", "expires", "future", "script", "words")

    def __init__(
        self, future: asyncio.Future[Any], data: bytes, expires: float, script: Script | None, words: tuple[Any, ...]
    ) -> None:
        self.future = future
        self.data = data
        self.expires = expires  # loop time; not written by then: it fails, certainly not executed
        self.script = script
        self.words = words  # of a script: (number of keys, *keys, *args)

    def whole(self) -> bytes:
        """As any server understands it, whatever scripts that one knows."""
        return self.data if self.script is None else pack(("EVAL", self.script.source, *self.words))


class Refused(NamedTuple):
    command: Command
    refusal: Refusal
    text: str


class Pipeline:
    """See the module. All methods belong to the loop's thread."""

    def __init__(self, server: str, wait_s: float, commands_max: int) -> None:
        """server: for error texts."""
        self.trouble = asyncio.Event()  # the connection is lost, or refused commands wait for a decision
        self.refused: list[Refused] = []
        self.held = False  # while the link decides about them, nothing is written
        self.written = 0  # writes to the socket so far
        self.commands = 0  # commands in them
        self.progress_at = 0.0  # loop time of the last reply, or of the write that made the first one due
        self._server = server
        self._wait_s = wait_s
        self._commands_max = commands_max
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Command] = deque()  # in order of expiry
        self._sent: deque[Command] = deque()
        self._bytes = 0  # of everything queued or unanswered
        self._flush_due = False
        self._expiry: asyncio.TimerHandle | None = None
        self._loaded: set[str] = set()  # scripts whose body this connection has sent
        self._wire: Wire | None = None
        self._asked: Endpoint | None = None  # who answers
        self._lost_why = ""

    @property
    def attached(self) -> bool:
        return self._wire is not None

    @property
    def waiting(self) -> int:
        """Commands queued or unanswered."""
        return len(self._queue) + len(self._sent) + len(self.refused)

    @property
    def reply_due(self) -> bool:
        return bool(self._sent)

    @property
    def lost_why(self) -> str:
        """Why the last connection was lost."""
        return self._lost_why

    def enqueue(self, data: bytes, script: Script | None, words: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Raises LinkBusy, and then nothing was queued."""
        if len(self._queue) + len(self._sent) >= self._commands_max or self._bytes > BYTES_MAX:
            raise LinkBusy(f"{self.waiting} commands ({self._bytes} bytes) wait on {self._server}")
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        self._bytes += len(data)
        self._queue.append(Command(future, data, loop.time() + self._wait_s, script, words))
        if not self._flush_due:
            self._flush_due = True
            loop.call_soon(self.flush)
        return future

    def attach(self, wire: Wire, asked: Endpoint) -> None:
        """A new connection; nothing is written before the next `flush`."""
        self._loaded.clear()
        self.trouble.clear()
        self._wire, self._asked = wire, asked
        wire.start(self._on_reply, self.lose, self.flush)

    def detach(self) -> None:
        """Leave a connection that owes no reply; the queue waits for the next one."""
        assert not self._sent
        self._wire = None
        self._watch_expiry()

    def lose(self, reason: str) -> None:
        """The connection is gone: what was written has an unknown outcome; what was refused or queued has not run."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        wire.close()
        self._lost_why = reason
        unknown = list(self._sent)
        self._sent.clear()
        self._fail(unknown, LinkDown(f"lost {self._server}: {reason}", maybe_sent=True))
        self.put_back()
        self.trouble.set()

    def forget_scripts(self) -> None:
        self._loaded.clear()

    def put_back(self) -> None:
        """The refused commands are the next to be written."""
        self._queue.extendleft(entry.command for entry in reversed(self.refused))
        self.refused.clear()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._watch_expiry()

    def settle(self, command: Command, reply: Any) -> None:
        """reply: a value, or the LinkError to raise. A caller who has gone is left alone."""
        self._bytes -= len(command.data)
        if command.future.done():
            return
        if isinstance(reply, LinkError):
            command.future.set_exception(reply)
            command.future.exception()  # asyncio need not warn: of several calls a caller may hear only the first fail
        else:
            command.future.set_result(reply)

    def fail_all(self, error: LinkError) -> None:
        """The end: what was written may have run, the rest has not."""
        sent = list(self._sent)
        rest = [*(entry.command for entry in self.refused), *self._queue]
        self._sent.clear()
        self.refused.clear()
        self._queue.clear()
        self._wire = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._fail(sent, LinkDown(str(error), maybe_sent=True))
        self._fail(rest, error)

    def flush(self) -> None:
        """Write all that is queued, if it may be written now."""
        self._flush_due = False
        wire = self._wire
        queue = self._queue
        if not queue:
            return
        if wire is None or not wire.writable or self.refused or self.held:
            self._watch_expiry()
            return
        sent = self._sent
        if not sent:
            self.progress_at = self._loop.time()
        self.commands += len(queue)
        self.written += 1
        if len(queue) == 1:
            command = queue.popleft()
            sent.append(command)
            wire.write(command.data if command.script is None else self._script_data(command, command.script))
            return
        batch = [one.data if one.script is None else self._script_data(one, one.script) for one in queue]
        sent.extend(queue)
        queue.clear()
        wire.write(b"".join(batch))

    def _script_data(self, command: Command, script: Script) -> bytes:
        """The digest if this connection has sent the body before, else the body."""
        if script.sha in self._loaded:
            return command.data
        self._loaded.add(script.sha)
        return command.whole()

    def _watch_expiry(self) -> None:
        if self._expiry is None and self._queue:
            self._expiry = self._loop.call_at(self._queue[0].expires, self._expire)

    def _expire(self) -> None:
        """Fail what has waited too long."""
        self._expiry = None
        now = self._loop.time()
        late = []
        while self._queue and self._queue[0].expires <= now:
            late.append(self._queue.popleft())
        if late:
            self._fail(late, LinkDown(f"no connection to {self._server} within {self._wait_s:g} s", maybe_sent=False))
        if self._wire is None or not self._wire.writable or self.refused or self.held:
            self._watch_expiry()

    def _fail(self, commands: Iterable[Command], error: LinkError) -> None:
        for command in commands:
            self.settle(command, error)

    def _on_reply(self, reply: Any) -> None:
        self.progress_at = self._loop.time()
        if not self._sent:
            self.lose("a reply that nothing asked for")
            return
        command = self._sent.popleft()
        if type(reply) is ReplyError:
            self._on_error(command, str(reply))
        else:
            self._bytes -= len(command.data)
            if not command.future.done():
                command.future.set_result(reply)
        if self.refused and not self._sent:
            self.trouble.set()  # every reply is in

    def _on_error(self, command: Command, text: str) -> None:
        assert self._asked is not None
        refusal = parse_refusal(text, self._asked)
        if refusal is None or (isinstance(refusal, Unknown) and command.script is None):
            self.settle(command, to_server_error(text))
        else:
            self.refused.append(Refused(command, refusal, text))
