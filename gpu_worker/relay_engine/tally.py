"""Counts and outcome of one answer: what the node says, else what was seen of it. Pure."""

from typing import Literal

from gpu_worker.relay_engine.wire import Chunk

BYTES_PER_TOKEN = 4  # where a node tells no count


def tokens_of(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


class Tally:
    def __init__(self, prompt_tokens: int) -> None:
        """prompt_tokens: an estimate, until the node tells."""
        self.prompt_tokens = prompt_tokens
        self.texts = 0  # chunks with text: one token each, as good as all streams are cut
        self._finish: Literal["", "stop", "length"] = ""
        self._told = 0
        self._done = False

    def count(self, chunk: Chunk) -> None:
        self.texts += bool(chunk.text)
        self._finish = self._finish or chunk.finish
        self._told = chunk.completion_tokens or self._told
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self._done = self._done or chunk.done

    @property
    def reason(self) -> Literal["", "stop", "length"]:
        """Why the answer is over; "" if it broke off: neither a finish_reason, nor [DONE] after some text."""
        if self._finish:
            return self._finish
        return "stop" if self._done and self.texts else ""

    def new_tokens(self, size: int, *, streamed: bool) -> int:
        """Tokens of this call, whose text has `size` bytes."""
        return self._told or (self.texts if streamed else tokens_of(size))
