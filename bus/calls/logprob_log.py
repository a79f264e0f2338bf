"""The log probabilities of one answer as a waiting process hears them: records appended in order, read by text offsets.

They come and are stored as the text is: by offset, repeats dropped, holes filled from what is stored. Who reads takes
the records that begin in the bytes of text he takes, so nothing of them needs an offset of its own outside.
"""

from array import array
from bisect import bisect_left

from bus.codec.logprobs import ANSWER_BYTES_MAX, TokenLogprobs, decode_record, is_restart, record_heads, record_places


class LogprobLog:
    """`generation` changes when records that were read may have moved; positions in the text still hold."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.generation = 0
        self._ats = array("Q")  # of each record that stands: not of those whose place another engine's have taken
        self._begins = array("Q")
        self._target = 0  # the log is known to reach this far

    @property
    def missing(self) -> bool:
        return len(self.raw) < self._target

    def expect(self, size: int) -> None:
        self._target = max(self._target, size)

    def expect_exactly(self, size: int) -> None:
        """The attempt has ended: whatever was heard of longer logs was of earlier ones."""
        self._target = size

    def reset(self) -> None:
        """A new attempt began with nothing."""
        self._cut(0)

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
        places = record_places(fresh)
        base = len(self.raw)
        self.raw += fresh
        self._list(base, places)
        self._target = max(self._target, len(self.raw))
        return True

    def bound(self, start: int, end: int, records: int) -> int:
        """Where to stop between start and end of the text so that only about so many records begin before it."""
        last = bisect_left(self._ats, start) + records
        return min(end, self._ats[last]) if last < len(self._ats) else end

    def read(self, index: int, start: int, end: int) -> tuple[tuple[TokenLogprobs, ...], int]:
        """Records from number `index` on that begin in bytes start..end of the text, and the number to go on from."""
        found: list[TokenLogprobs] = []
        while index < len(self._ats) and self._ats[index] < end:
            if self._ats[index] >= start:
                record = decode_record(self.raw, self._begins[index])
                assert record is not None, "restarts are not listed"
                found.append(record)
            index += 1
        return tuple(found), index

    def _list(self, begin: int, places: list[tuple[int, int]]) -> None:
        """List records of `raw`; (at, end) of each, its end counted from byte `begin` of all."""
        base, dropped = begin, False
        for at, end in places:
            if is_restart(self.raw, begin):
                while self._ats and self._ats[-1] >= at:
                    self._ats.pop()
                    self._begins.pop()
                    dropped = True
            else:
                self._ats.append(at)
                self._begins.append(begin)
            begin = base + end
        self.generation += dropped

    def _cut(self, size: int) -> None:
        """Also brings back what a restart behind `size` had taken the place of."""
        self.generation += 1
        del self.raw[size:]
        self._ats, self._begins = array("Q"), array("Q")
        self._target = size
        places = record_heads(self.raw)
        if (places[-1][1] if places else 0) != size:
            raise ValueError("log probabilities go on within a record")
        self._list(0, places)
