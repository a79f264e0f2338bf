"""From what a node says to what may be published: nothing twice, nothing that contradicts, no stop string. Pure."""

from typing import Literal

from gpu_worker.relay_engine.faults import Diverged

# A node that ignores max_tokens is cut here: far above what any tokenizer puts into a token on average.
BYTES_PER_TOKEN_MAX = 64
ANSWER_BYTES_MAX = 8 * 1024 * 1024


class Answer:
    """The text of one sequence, as UTF-8 bytes after what was shown by earlier attempts.

    shown: that text. again: the node generates from the start, so bytes equal to `shown` are swallowed and the first
    difference raises Diverged; otherwise the node continues right after `shown`.

    A suffix that may begin a stop string is held back until it is decided. `shown` never ends in such a suffix,
    because whoever published it held it back too; so only new text is searched.
    """

    def __init__(self, shown: bytes, stop: tuple[str, ...], max_tokens: int | None, *, again: bool) -> None:
        self.offset = len(shown)  # of the next byte to publish
        self.ended: Literal["", "stop", "length"] = ""  # ended by us: a stop string, or too much text
        self._to_match = shown if again else b""
        self._stop = stop
        self._held = ""
        budget = ANSWER_BYTES_MAX if max_tokens is None else max_tokens * BYTES_PER_TOKEN_MAX
        self._room = min(ANSWER_BYTES_MAX, budget + len(shown)) - len(shown)

    def feed(self, text: str) -> bytes:
        """What may be published now. Raises Diverged. After `ended` is set, nothing more is taken."""
        if self.ended:
            return b""
        text = self._swallow(text)
        self._held += text
        found = [at for at in (self._held.find(one) for one in self._stop) if at >= 0]
        if found:
            self.ended = "stop"
            return self._publish(min(found))
        return self._publish(len(self._held) - self._undecided())

    def finish(self) -> bytes:
        """The node is done: what was held back is text after all. Raises Diverged if it stopped short of `shown`."""
        if self._to_match:
            raise Diverged
        return b"" if self.ended else self._publish(len(self._held))

    def _swallow(self, text: str) -> str:
        if not self._to_match:
            return text
        raw = text.encode()
        size = min(len(raw), len(self._to_match))
        if raw[:size] != self._to_match[:size]:
            raise Diverged
        self._to_match = self._to_match[size:]
        try:
            return raw[size:].decode()
        except UnicodeDecodeError as error:  # what was shown ends inside one of these characters
            raise Diverged from error

    def _undecided(self) -> int:
        """Length of the longest suffix that a stop string could begin with."""
        most = min(max((len(one) for one in self._stop), default=1) - 1, len(self._held))
        for size in range(most, 0, -1):
            if any(one.startswith(self._held[-size:]) for one in self._stop):
                return size
        return 0

    def _publish(self, chars: int) -> bytes:
        text, self._held = self._held[:chars], self._held[chars:]
        raw = text.encode()
        if len(raw) > self._room:
            raw = raw[: self._room].decode(errors="ignore").encode()
            self.ended = "length"
        self._room -= len(raw)
        self.offset += len(raw)
        return raw
