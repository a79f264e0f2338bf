"""The log probabilities of one answer as a waiting process hears them: records appended in order, read by text offsets.

They come and are stored as the text is: by offset, repeats dropped, holes filled from what is stored. Who reads takes
the records that begin in the bytes of text he takes, so nothing of them needs an offset of its own outside.
"""

from array import array

from bus.codec.logprobs import ANSWER_BYTES_MAX, TokenLogprobs, at_of, collect, decode_record, record_places


class LogprobLog:
    """`generation` changes when records that were read may have moved; positions in the text still hold."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.generation = 0
        self._ats = array("Q")  # of each record
        self._ends = array("Q")
        self._target = 0  # the log is known to reach this far

    @property
    def missing(self) -> bool:
        return len(self.raw) < self._target

    def expect(self, size: int) -> None:
        self._target = max(self._target, size)

    def reset(self) -> None:
        """A new attempt began with nothing."""
        self._cut(0)
        self._target = 0

    def take(self, offset: int, data: bytes) -> bool:
        """Whole records from byte `offset` on. False: there is a hole before them, and nothing was taken.

        Raises ValueError for what are no records. Where others were known already, these count: the server lost its
        last second, and an engine whose numbers differ a little went on.
        """
        if offset > len(self.raw):
            return False
        if offset + len(data) > ANSWER_BYTES_MAX:
            raise ValueError("an answer has more log probabilities than it may have")
        overlap = min(len(self.raw) - offset, len(data))
        if self.raw[offset : offset + overlap] != data[:overlap]:
            self._cut(offset)
            overlap = 0
        fresh = data[overlap:]
        base = len(self.raw)
        for at, end in record_places(fresh):
            self._ats.append(at)
            self._ends.append(base + end)
        self.raw += fresh
        return True

    def read(self, index: int, start: int, end: int) -> tuple[tuple[TokenLogprobs, ...], int]:
        """Records from number `index` on that begin in bytes start..end of the text, and the number to go on from."""
        found: list[TokenLogprobs | int] = []
        while index < len(self._ats) and self._ats[index] < end:
            begin = self._ends[index - 1] if index else 0
            found.append(decode_record(self.raw, begin) or at_of(self.raw, begin))
            index += 1
        return tuple(collect(found, start, end)), index

    def _cut(self, size: int) -> None:
        self.generation += 1
        while self._ends and self._ends[-1] > size:
            self._ends.pop()
            self._ats.pop()
        del self.raw[self._ends[-1] if self._ends else 0 :]
        if len(self.raw) != size:
            raise ValueError("log probabilities go on within a record")
