"""What the engine's sequences produced since the service last looked: one piece each, with a bound."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from gpu_worker.engine import End, Piece, SequenceId

PENDING_BYTES_MAX = 256 * 1024  # of one sequence; beyond it its call is not read any further


class _Pending:
    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.text = bytearray()
        self.logprobs = bytearray()
        self.end: End | None = None

    @property
    def size(self) -> int:
        return len(self.text) + len(self.logprobs)


class Outbox:
    def __init__(self) -> None:
        self._pending: dict[SequenceId, _Pending] = {}
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False

    def add(
        self, sequence: SequenceId, offset: int, text: bytes, end: End | None = None, logprobs: bytes = b""
    ) -> None:
        """Append text that begins at `offset` of the answer, its log probabilities, and perhaps the end."""
        pending = self._pending.setdefault(sequence, _Pending(offset))
        assert pending.end is None and pending.offset + len(pending.text) == offset, sequence
        pending.text += text
        pending.logprobs += logprobs
        pending.end = end
        self._changed.set()

    async def room(self, sequence: SequenceId) -> None:
        """Wait until little enough of the sequence is pending. The service's own deadlines end the wait by cancel."""
        while (pending := self._pending.get(sequence)) is not None and pending.size >= PENDING_BYTES_MAX:
            self._taken.clear()
            await self._taken.wait()

    async def batches(self) -> AsyncIterator[Sequence[Piece]]:
        while not self._closed or self._pending:
            await self._changed.wait()
            self._changed.clear()
            taken, self._pending = self._pending, {}
            self._taken.set()
            if taken:
                yield [
                    Piece(key, one.offset, bytes(one.text), 0, (), one.end, bytes(one.logprobs))
                    for key, one in taken.items()
                ]

    def close(self) -> None:
        self._closed = True
        self._changed.set()
