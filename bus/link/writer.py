"""Link: one connection, shared by everything in the process that sends commands to one cell.

Callers get futures and never touch the socket; a cancelled caller abandons its future only. The pipeline (pipeline.py)
holds the commands; an owner task connects, reconnects with backoff and watches over the connection. What breaks:

  connection lost      what was written fails with LinkDown(maybe_sent=True): nobody knows, and the link never sends it
                       again. What was not waits for the next connection, up to wait_s, then LinkDown(maybe_sent=False).
  refused replies      (NOSCRIPT, MOVED, ASK, READONLY ...) say that a command was not executed: it is sent again, to
                       where the refusal says, in order and before anything newer.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Self

from bus.link.address import Endpoint, ServerAddress
from bus.link.asking import REFUSED, Askable
from bus.link.backoff import backoff_s
from bus.link.dial import ServerInfo, dial
from bus.link.errors import LinkClosed, LinkDown, LinkError, ServerError
from bus.link.pipeline import Pipeline
from bus.link.refusal import Asking, Elsewhere, Later, Unknown
from bus.link.script import Script
from bus.link.wire import Wire, pack

log = logging.getLogger(__name__)

Argument = str | bytes | int | float

QUEUE_MAX = 20_000  # commands waiting or unanswered
WAIT_S = 5.0  # how long a command may wait for a connection
REPLY_S = 5.0  # no reply at all for so long while one is due: the connection is dead
IDLE_S = 10.0  # a silent connection is asked for a PONG, so that a dead one is found before it is needed
TRY_AGAIN_S = 0.05
WATCH_S = 0.5


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
        link = cls(
            address, name, cell_key, connect_timeout_s, reply_s, idle_s, Pipeline(str(address), wait_s, queue_max)
        )
        await link._open()
        return link

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        cell_key: str,
        connect_timeout_s: float,
        reply_s: float,
        idle_s: float,
        pipeline: Pipeline,
    ) -> None:
        """Use `Link.connect`."""
        self.address = address
        self.name = name
        self.generation = 0  # grows at every connect
        self.run_id = ""  # of the server, read at each connect; another one: its data may be older than ours
        self.info: ServerInfo | None = None
        self._cell_key = cell_key
        self._connect_timeout_s = connect_timeout_s
        self._reply_s = reply_s
        self._idle_s = idle_s
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._up = asyncio.Event()
        self._closed = False
        self._hint: Endpoint | None = None  # where a MOVED sent us
        self._callbacks: list[Callable[[], None]] = []
        self._owner: asyncio.Task[None] | None = None

    # what callers use

    @property
    def connected(self) -> bool:
        return self._pipeline.attached

    @property
    def waiting(self) -> int:
        """Commands queued or unanswered."""
        return self._pipeline.waiting

    @property
    def written(self) -> int:
        """Writes to the socket so far: round trips at most."""
        return self._pipeline.written

    def send(self, *args: Argument) -> asyncio.Future[Any]:
        """Queue one command; it leaves with all others of this loop tick.

        The future raises ServerError, LinkDown or LinkClosed. Raises LinkBusy or LinkClosed at once.
        """
        if self._closed:
            raise LinkClosed("the link was closed")
        return self._pipeline.enqueue(pack(args), None, ())

    def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> asyncio.Future[Any]:
        """Queue one call of a Lua script; errors as for `send`."""
        if self._closed:
            raise LinkClosed("the link was closed")
        words = (len(keys), *keys, *args)
        return self._pipeline.enqueue(pack(("EVALSHA", script.sha, *words)), script, words)

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
        self._pipeline.fail_all(LinkClosed("the link was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

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
        self.run_id = self.info.run_id
        self.generation += 1
        self._pipeline.attach(wire, self.info.endpoint)
        return wire

    async def _own(self, wire: Wire) -> None:
        """Runs as long as the link: watch the connection, and make a new one when it ends."""
        try:
            while True:
                self._up.set()
                if self.generation > 1:
                    self._tell_reconnected()
                self._pipeline.flush()
                await self._watch()
                self._up.clear()
                await wire.release()
                wire = await self._reconnect()
        except Exception:
            log.exception("a link ended by a bug", extra={"link": self.name})
        finally:
            # Nobody may wait for ever on a link without its owner.
            self._closed = True
            self._up.clear()
            self._pipeline.fail_all(LinkClosed("the link was closed"))
            await wire.release()

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

    async def _watch(self) -> None:
        """Returns when the connection is over or must be replaced."""
        trouble = self._pipeline.trouble
        while True:
            try:
                async with asyncio.timeout(WATCH_S):
                    await trouble.wait()
            except TimeoutError:
                self._look_after()
                continue
            trouble.clear()
            if not self._pipeline.attached:
                extra = {"link": self.name, "server": str(self.address), "reason": self._pipeline.lost_why}
                log.warning("link lost", extra=extra)
                return
            self._pipeline.held = True
            try:
                elsewhere = await self._decide_refused()
            finally:
                self._pipeline.held = False
            if elsewhere:
                return
            self._pipeline.flush()  # if the connection was lost meanwhile, `trouble` tells

    def _look_after(self) -> None:
        silent_s = self._loop.time() - self._pipeline.progress_at
        if self._pipeline.reply_due and silent_s > self._reply_s:
            self._pipeline.lose(f"no reply for {silent_s:.1f} s")
        elif not self._pipeline.waiting and silent_s > self._idle_s:
            self.send("PING").add_done_callback(_forget)

    async def _decide_refused(self) -> bool:
        """Put the refused commands where they belong, all replies being in. True: on another connection."""
        pipeline = self._pipeline
        first = pipeline.refused[0]
        log.info("commands refused", extra={"link": self.name, "count": len(pipeline.refused), "why": first.text})
        match first.refusal:
            case Unknown():
                pipeline.forget_scripts()
            case Later():
                await asyncio.sleep(TRY_AGAIN_S)
            case Asking(endpoint):
                await self._ask_elsewhere(endpoint)
            case Elsewhere(endpoint):
                self._hint = endpoint
                pipeline.put_back()
                pipeline.detach()
                return True
        pipeline.put_back()
        return False

    async def _ask_elsewhere(self, endpoint: Endpoint) -> None:
        """Run the commands that got ASK at the importing node, one by one; what it refuses stays refused."""
        pipeline = self._pipeline
        try:
            async with Askable.dial(self.address, endpoint, self.name, self._connect_timeout_s) as node:
                for entry in list(pipeline.refused):
                    if entry.refusal != Asking(endpoint):
                        continue
                    # Out of the list first: if the link is lost meanwhile, this one must not be sent again.
                    pipeline.refused.remove(entry)
                    reply: Any = LinkDown("the link was closed", maybe_sent=True)
                    try:
                        reply = await node.run(entry.command.whole(), self._reply_s)
                    finally:
                        if reply is not REFUSED:
                            pipeline.settle(entry.command, reply)
                    if reply is REFUSED:
                        pipeline.refused.insert(0, entry)
                        break
        except LinkError as error:
            log.warning("ASK not followed", extra={"link": self.name, "server": str(endpoint), "why": str(error)})
            await asyncio.sleep(TRY_AGAIN_S)


def _forget(future: asyncio.Future[Any]) -> None:
    """A PING's outcome shows in the connection, not here."""
    if not future.cancelled():
        future.exception()
