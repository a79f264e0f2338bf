"""What penalties and biases read of one sequence, as arrays that grow with it: a step costs no walk over its tokens.

A sequence's tokens only ever grow (drafts are none of them), so the arrays stay right when it is preempted or moved.
"""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

Ints = NDArray[numpy.int64]
Floats = NDArray[numpy.float32]


class TokenHistory:
    """prompt: those of its tokens that count; bias: (token, added to its logit), each token once."""

    def __init__(self, prompt: Sequence[int] = (), bias: Sequence[tuple[int, float]] = ()) -> None:
        self.prompt: Ints = numpy.unique(numpy.array(prompt, dtype=numpy.int64))
        self.bias_tokens: Ints = numpy.array([token for token, _ in bias], dtype=numpy.int64)
        self.bias: Floats = numpy.array([value for _, value in bias], dtype=numpy.float32)
        self._place: dict[int, int] = {}
        self._tokens: Ints = numpy.zeros(16, dtype=numpy.int64)
        self._counts: Floats = numpy.zeros(16, dtype=numpy.float32)
        self._read = 0

    @property
    def tokens(self) -> Ints:
        """Different tokens of the answer."""
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> Floats:
        """How often each of them stands in it: whole numbers."""
        return self._counts[: len(self._place)]

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Count what came since the last time. tokens: all of the sequence; start: where its answer begins."""
        for at in range(start + self._read, len(tokens)):
            token = tokens[at]
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._tokens):
                self._tokens = numpy.concatenate([self._tokens, numpy.zeros_like(self._tokens)])
                self._counts = numpy.concatenate([self._counts, numpy.zeros_like(self._counts)])
            self._tokens[place] = token
            self._counts[place] += 1
        self._read = max(self._read, len(tokens) - start)
