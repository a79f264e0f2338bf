"""What one waiting caller knows of its job: a pure fold of the out-stream's entries into text and an outcome.

The out-stream of a gateway carries, for each of its jobs, markers, frames and one end. Attempts may die and be
replaced, streams may be read twice or with holes, and a server may have forgotten its last second. The rules:

- The current fence is that of the last marker, in stream order; frames of other fences are dropped.
- Every offset is a UTF-8 byte offset of the answer. Bytes below what was shown are *compared*, not just dropped: at the
  first difference the answer cannot be continued honestly and ends `interrupted`.
- A frame, marker or end beyond what is known leaves a hole, which is filled from the stored text (`hole()` says which
  bytes of which attempt); frames are never needed twice, so a hole costs one read.
- The first end wins; whatever comes later changes nothing.

                marker            frame(offset <= known)         end(text_len <= known)
     waiting ------------> open ------------------------> open ------------------------> over
                             |  frame beyond, end beyond -> hole -> filled(bytes) -> ...
"""

import msgspec


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
    """Bytes [start, end) of the text stored for `fence` are missing here; end None = all there is."""

    fence: str
    start: int
    end: int | None


def interrupted(message: str, new_tokens: int = 0) -> Ended:
    return Ended(
        state="failed", reason="interrupted", error_code="interrupted", error_message=message, new_tokens=new_tokens
    )


class Following:
    """The fold. `text` only grows; `ended` is set once.

    text: the answer's bytes so far, always whole UTF-8 characters. For a job that did not ask to stream it is empty
    until the end. `fence` is "" until the first marker (or until an attach named it).
    """

    __slots__ = ("_pending_end", "_target", "ended", "fence", "markers", "streamed", "text")

    def __init__(self, *, streamed: bool, fence: str = "") -> None:
        self.streamed = streamed
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

    def frame(self, fence: str, offset: int, text: bytes) -> None:
        if self.ended is not None or fence != self.fence or not self.streamed:
            return
        known = len(self.text)
        if offset > known:
            self._target = max(self._target, offset + len(text))
            return
        overlap = known - offset
        if overlap and not text.startswith(bytes(self.text[offset : offset + len(text)])[:overlap]):
            self.ended = interrupted("another node continued this answer with other words; ask again")
            return
        self.text += text[overlap:]
        self._settle()

    def end(self, fence: str, text_len: int, ended: Ended, text: bytes | None) -> None:
        """The terminal. `text` is the whole answer where the entry carried it, None where it is to be read."""
        if self.ended is not None or self._pending_end is not None:
            return
        if fence:
            self.fence = fence
        if text is not None and not self.streamed:
            self.text[:] = text
            self.ended = ended
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
        if self.ended is not None or len(self.text) >= self._target or not self.fence:
            return None
        return Hole(self.fence, len(self.text), self._target)

    def filled(self, hole: Hole, data: bytes) -> bool:
        """Bytes read for `hole`. False if nothing came: the stored text is gone or shorter; ask for the job's state."""
        if self.ended is not None or hole.start > len(self.text):
            return True
        if not data:
            return False
        fresh = data[len(self.text) - hole.start :]
        self.text += fresh
        self._settle()
        return bool(fresh) or len(self.text) >= self._target

    def give_up(self, ended: Ended) -> None:
        """End without the rest of the text (it is gone, or the stream went to another gateway)."""
        if self.ended is None:
            self.ended = ended

    def waiting_for_text(self) -> Ended | None:
        """The end that is held back until its text is whole."""
        return self._pending_end if self.ended is None else None

    def _settle(self) -> None:
        if self._pending_end is not None and len(self.text) >= self._target:
            self.ended = self._pending_end
