"""The log probabilities of one attempt on their way to the server: what `Held` is for the text. Pure.

Offsets are bytes of the whole answer's records, those of earlier attempts included, which are not held here.
"""

from array import array
from bisect import bisect_right

import msgspec

from bus.codec.logprobs import ANSWER_BYTES_MAX, record_heads
from gpu_worker.engine import End

TOO_MANY = End(
    "error",
    error_code="bad_request",
    error_message=f"the log probabilities of this answer have more than {ANSWER_BYTES_MAX} bytes; ask for fewer",
    fault="client",
)


class Part(msgspec.Struct, frozen=True):
    """What goes next: records up to byte `end`."""

    end: int
    records: int  # of this attempt, up to there
    text_at: int | None  # where the first record that has to wait begins in the text; None: none has to


class AnswerLog:
    def __init__(self, base: int = 0) -> None:
        """base: bytes that earlier attempts stored."""
        self.sent = self.stored = self._base = base
        self.full = False  # there was more than ANSWER_BYTES_MAX; it was not taken
        self._raw = bytearray()
        self._ends = array("Q")  # of each record, in the whole answer
        self._ats = array("Q")

    @property
    def size(self) -> int:
        return self._base + len(self._raw)

    @property
    def kept(self) -> int:
        """Bytes of memory, roughly."""
        return len(self._raw) + 16 * len(self._ends)

    def __contains__(self, offset: int) -> bool:
        """Whether the log can be sent from there."""
        return self._base <= offset <= self.size

    def append(self, records: bytes) -> None:
        if self.full or self.size + len(records) > ANSWER_BYTES_MAX:
            self.full = True
            return
        for at, end in record_heads(records):
            self._ats.append(at)
            self._ends.append(self.size + end)
        self._raw += records

    def rewind(self, stored: int | None) -> None:
        if stored is not None:
            self.stored = stored
        self.sent = self.stored

    def cut(self, start: int, end: int) -> bytes:
        return bytes(self._raw[start - self._base : end - self._base])

    def next_part(self, bytes_max: int) -> Part:
        """bytes_max: at least one record's."""
        if self.size - self.sent <= bytes_max:
            return Part(self.size, len(self._ends), None)
        records = bisect_right(self._ends, self.sent + bytes_max)
        return Part(self._ends[records - 1], records, self._ats[records])
