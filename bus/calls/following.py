"""What one waiting caller knows of its job: a pure fold of the out-stream's entries into text and an outcome.

The out-stream of a gateway carries, for each of its jobs, markers, frames and one end. Attempts may die and be
replaced, streams may be read twice or with holes, and a server may have forgotten its last second. The rules:

- The current fence is that of the last marker, in stream order; frames of other fences are dropped.
- Every offset is a UTF-8 byte offset of the answer. Bytes below what was shown are *compared*, not just dropped: at the
  first difference the answer cannot be continued honestly and ends `interrupted`.
- A frame, marker or end beyond what is known leaves a hole, which is filled from the stored text (`hole()` says which
  bytes of which attempt); frames are never needed twice, so a hole costs one read.
- Log probabilities, of a job that asks for them, come beside the text and by the same rules (`LogprobLog`). Text is
  taken only together with those that belong to it.
- The first end wins; whatever comes later changes nothing.

                marker            frame(offset <= known)         end(text_len <= known)
     waiting ------------> open ------------------------> open ------------------------> over
                             |  frame beyond, end beyond -> hole -> filled(bytes) -> ...
"""

from collections.abc import Iterator

import msgspec

from bus.calls.logprob_log import LogprobLog
from bus.codec.logprobs import record_parts


class Records(msgspec.Struct, frozen=True):
    """Log probabilities that came with a text: whole records, from byte `offset` of all on."""

    offset: int
    data: bytes


class Ended(msgspec.Struct, frozen=True):
    """The one terminal of a job, as its caller sees it."""

    state: str  # done | failed | cancelled
    reason: str  # stop | length | cancelled | an error code
    prompt_tokens: int = 0
    new_tokens: int = 0
    node: str = ""
    error_code: str = ""
    error_message: str = ""
    retry_after_ms: int = 0
    attempts: int = 0


class Hole(msgspec.Struct, frozen=True):
    """Bytes [start, end) of the text stored for `fence` are missing here; end None = all there is.

    logprobs_from: read the stored records from there too, after the text; None = they are not asked for."""

    fence: str
    start: int
    end: int | None
    logprobs_from: int | None = None


def interrupted(message: str, new_tokens: int = 0) -> Ended:
    return Ended(
        state="failed", reason="interrupted", error_code="interrupted", error_message=message, new_tokens=new_tokens
    )


class Following:
    """The fold. `text` only grows; `ended` is set once.

    text: the answer's bytes so far, always whole UTF-8 characters. For a job that did not ask to stream it is empty
    until the end. `fence` is "" until the first marker (or until an attach named it).
    """

    __slots__ = ("_pending_end", "_target", "ended", "fence", "logprobs", "markers", "streamed", "text")

    def __init__(self, *, streamed: bool, fence: str = "", scored: bool = False) -> None:
        self.streamed = streamed
        self.logprobs = LogprobLog() if scored else None  # None: the job does not ask for them
        self.fence = fence
        self.text = bytearray()
        self.ended: Ended | None = None
        self.markers = 0  # heard so far: an answer that was asked for before the last one is older than what we know
        self._target = 0  # the text of the current fence is known to reach this far
        self._pending_end: Ended | None = None  # held back until the text is whole

    def stream(self) -> None:
        """Frames count from now on: somebody wants them of a job whose first caller waits for the whole."""
        self.streamed = True

    def marker(self, fence: str, text_len: int) -> None:
        """A new attempt took over; it starts at `text_len`, with the same bytes below that."""
        if self.ended is not None or self._pending_end is not None:
            return
        self.markers += 1
        self.fence = fence
        self._target = text_len if self.streamed else 0
        if self.logprobs is not None and not text_len:
            self.logprobs.reset()

    def frame(self, fence: str, offset: int, text: bytes, records: Records | None = None) -> None:
        if self._is_over() or fence != self.fence or not self.streamed:
            return
        known = len(self.text)
        if offset > known or not self._take_records(records):
            self._target = max(self._target, offset + len(text))
            return
        if self._is_over():
            return
        overlap = known - offset
        if overlap and not text.startswith(bytes(self.text[offset : offset + len(text)])[:overlap]):
            self.ended = interrupted("another node continued this answer with other words; ask again")
            return
        self.text += text[overlap:]
        self._settle()

    def end(
        self,
        fence: str,
        text_len: int,
        ended: Ended,
        text: bytes | None,
        logprobs_len: int = 0,
        records: bytes | None = None,
    ) -> None:
        """The terminal. `text` is the whole answer where the entry carried it, None where it is to be read; so are its
        `records`, which have `logprobs_len` bytes."""
        if self.ended is not None or self._pending_end is not None:
            return
        if fence:
            self.fence = fence
        if self.logprobs is not None:
            if records is not None and not self.streamed:
                if not records.startswith(self.logprobs.raw):
                    self.logprobs.reset()
                self._take_records(Records(0, records))
            self.logprobs.expect_exactly(logprobs_len)
        if text is not None and not self.streamed:
            self.text[:] = text
            self._pending_end, self._target = ended, 0
            self._settle()
            return
        if text_len < len(self.text):
            # Only after a rollback or a re-drive: less was kept than was shown. What was shown stays shown.
            self.ended = (
                interrupted("the stored answer is shorter than what was already sent")
                if ended.state == "done"
                else ended
            )
            return
        self._pending_end = ended
        self._target = text_len
        self._settle()

    def hole(self) -> Hole | None:
        """What has to be read from the stored text before this answer can go on; None when nothing is missing."""
        if self.ended is not None or self._whole or not self.fence:
            return None
        logprobs_from = None if self.logprobs is None else len(self.logprobs.raw)
        return Hole(self.fence, len(self.text), max(self._target, len(self.text)), logprobs_from)

    def filled(self, hole: Hole, data: bytes, records: bytes = b"") -> bool:
        """Bytes read for `hole`. False if nothing came: the stored text is gone or shorter; ask for the job's state.

        Those of an attempt that a marker has replaced meanwhile are dropped: they tell nothing of what the new one has.
        """
        if self.ended is not None or hole.fence != self.fence or hole.start > len(self.text):
            return True
        if hole.logprobs_from is not None and records:
            self._take_records(Records(hole.logprobs_from, records))
        fresh = data[len(self.text) - hole.start :]
        self.text += fresh
        self._settle()
        return bool(fresh) or self._whole

    def take_in_parts(self, offset: int, records: bytes) -> Iterator[None]:
        """Take stored records part by part. In one go many megabytes of them would hold up all other callers; taken
        again with the text that they belong to, they are known already. Ends early at a new attempt, and at the end."""
        fence = self.fence
        for part in record_parts(records):
            if self.ended is not None or self.fence != fence:
                return
            self._take_records(Records(offset, part))
            offset += len(part)
            yield

    def give_up(self, ended: Ended) -> None:
        """End without the rest of the text (it is gone, or the stream went to another gateway)."""
        if self.ended is None:
            self.ended = ended

    def waiting_for_text(self) -> Ended | None:
        """The end that is held back until its text is whole."""
        return self._pending_end if self.ended is None else None

    def _is_over(self) -> bool:
        return self.ended is not None

    @property
    def _whole(self) -> bool:
        """Whether all is here that is known to be stored."""
        return len(self.text) >= self._target and not (self.logprobs is not None and self.logprobs.missing)

    def _take_records(self, records: Records | None) -> bool:
        """False: there is a hole before them."""
        if records is None or self.logprobs is None:
            return True
        self.logprobs.expect(records.offset + len(records.data))
        try:
            return self.logprobs.take(records.offset, records.data)
        except ValueError:
            self.ended = interrupted("a node sent log probabilities that cannot be read")
            return True

    def _settle(self) -> None:
        if self.ended is None and self._pending_end is not None and self._whole:
            self.ended = self._pending_end
