"""One waiting caller's end of a job: what `Caller.submit` and `Caller.attach` give out.

A handle has no queue: the job's text grows in one place (`Following`), the handle remembers how far it has read. A slow
reader therefore gets one larger piece later, never a growing backlog of small ones.
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec

from bus.calls.call import Call
from bus.calls.following import Ended
from bus.calls.logprob_log import LogprobLog
from bus.codec.logprobs import TokenLogprobs
from bus.codec.wire import Policy
from bus.ids import JobId

SLICE_RECORDS = 64  # log probabilities that are read without a pause: with 20 likeliest ones each, a few milliseconds


class TextDelta(msgspec.Struct, frozen=True):
    """Bytes offset..end of the answer, whole UTF-8 characters. `end` is what a client resumes from.

    logprobs: of the tokens that begin in these bytes; None: the job does not ask for them."""

    offset: int
    text: bytes
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def end(self) -> int:
        return self.offset + len(self.text)


class Finished(msgspec.Struct, frozen=True):
    """The one terminal, after all of the text."""

    ended: Ended
    text_len: int


class Detached(msgspec.Struct, frozen=True):
    """Another gateway took the stream over; this handle hears no more of it."""

    by: str


HandleEvent = TextDelta | Finished | Detached


class JobHandle:
    """Read with `next`, by iteration or with `result`; one task at a time. Close it when done, in a `finally`."""

    def __init__(self, call: Call, position: int, *, existing: bool = False) -> None:
        self._call = call
        self._position = position
        self._record, self._generation = 0, 0  # where we are in the log of log probabilities
        self.bounded = False  # the last piece had as many log probabilities as one may have: `next` pauses before more
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self.existing = existing  # the job was there before this call: same id or idempotency key
        call.handles.append(self)
        call.closing_at = None

    @property
    def job_id(self) -> JobId:
        return self._call.job_id

    @property
    def deadline_ms(self) -> int:
        """By the server's clock."""
        return self._call.deadline_ms

    @property
    def node(self) -> str:
        """Where the present attempt runs; "" while it waits."""
        return self._call.node

    @property
    def position(self) -> int:
        """Bytes of the answer that this handle has given out."""
        return self._position

    @property
    def known(self) -> int:
        """Bytes of the answer that are here, whether given out or not."""
        return len(self._call.following.text)

    def ready(self) -> HandleEvent | None:
        """What `next` would give without waiting."""
        call = self._call
        following = call.following
        if len(following.text) > self._position and (following.streamed or following.ended is not None):
            start = align(following.text, self._position)
            self._position = self._bound(start, len(following.text))
            return TextDelta(
                start, bytes(following.text[start : self._position]), self._logprobs(start, self._position)
            )
        if following.ended is not None:
            return Finished(following.ended, len(following.text))
        return Detached(call.taken_by) if call.taken_by else None

    async def next(self, timeout_s: float | None = None) -> HandleEvent | None:
        """The next piece of text, the end or the detachment; None if there is nothing within the time.

        It may be cancelled or time out at any moment and called again: nothing is lost.
        """
        if self.bounded:
            await asyncio.sleep(0)
        event = self.ready()
        if event is not None or timeout_s == 0:
            return event
        try:
            async with asyncio.timeout(timeout_s):
                while event is None:
                    await self._wait()
                    event = self.ready()
        except TimeoutError:
            return None
        return event

    async def __aiter__(self) -> AsyncIterator[HandleEvent]:
        """Text as it comes, then Finished or Detached, once."""
        while True:
            event = await self.next()
            assert event is not None
            yield event
            if not isinstance(event, TextDelta):
                return

    async def result(self) -> tuple[bytes, Ended]:
        """The whole answer and its end; waits at most until the job's deadline. For its log probabilities: `logprobs`.

        It also serves a caller whose stream went elsewhere: the stored terminal is asked for.
        """
        following = self._call.following
        while following.ended is None:
            await self._wait()
        self._position = len(following.text)
        return bytes(following.text), following.ended

    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of the whole answer so far; None: the job does not ask for them."""
        following = self._call.following
        return None if following.logprobs is None else following.logprobs.read(0, 0, len(following.text))[0]

    @property
    def scored(self) -> bool:
        """The job asks for log probabilities."""
        return self._call.following.logprobs is not None

    async def logprob_slices(self) -> AsyncIterator[tuple[TokenLogprobs, ...]]:
        """As `logprobs`, of an answer that has ended, in parts: others' work goes on between them."""
        following = self._call.following
        if following.logprobs is not None:
            async for found in slices_of(following.logprobs, bytes(following.text)):
                yield found

    def _bound(self, start: int, end: int) -> int:
        """Where a piece of text ends: whole characters, and no more log probabilities than are made at one go."""
        following = self._call.following
        self.bounded = False
        if following.logprobs is not None:
            bound = align(following.text, following.logprobs.bound(start, end, SLICE_RECORDS))
            self.bounded = start < bound < end
        return bound if self.bounded else end

    def _logprobs(self, start: int, end: int) -> tuple[TokenLogprobs, ...] | None:
        log = self._call.following.logprobs
        if log is None:
            return None
        if self._generation != log.generation:
            self._record, self._generation = 0, log.generation
        found, self._record = log.read(self._record, start, end)
        return found

    def close(self, policy: Policy | None = None) -> None:
        """Give the handle up; never blocks. If it was the job's last and the job is not over, `policy` (default: the
        job's own) decides: `keep` lets it finish, `cancel` ends it after the grace in which a client may come back."""
        if self._closed:
            return
        self._closed = True
        call = self._call
        call.handles.remove(self)
        if policy is not None:
            call.policy = policy
        if not call.handles and call.following.ended is None:
            call.closing_at = asyncio.get_running_loop().time()

    def wake(self) -> None:
        """Something was heard of the job."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        assert self._waiter is None, "a handle serves one task at a time"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def align(text: bytes | bytearray, position: int) -> int:
    """The start of the character that contains byte `position`: a client may resume from the middle of one."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


async def slices_of(log: LogprobLog, text: bytes) -> AsyncIterator[tuple[TokenLogprobs, ...]]:
    """All log probabilities of an answer, in parts: others' work goes on between them."""
    index, start = 0, 0
    while start < len(text):
        bound = log.bound(start, len(text), SLICE_RECORDS)
        end = bound if bound > start else len(text)
        found, index = log.read(index, start, end)
        yield found
        await asyncio.sleep(0)
        start = end
