"""What one step computes: plain values, made by the scheduler, read by whatever computes them."""

import dataclasses

from gpu_worker.torch_engine.sequence import Sequence
from gpu_worker.torch_engine.step_time import Piece


@dataclasses.dataclass(frozen=True)
class Work:
    """Compute `tokens` of one sequence from `start` on. Fixed when planned: the sequence may grow until it is read."""

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]  # drafts included
    sampled: int  # of how many of the last rows a token is drawn: 0 within a prompt, else 1 and one a draft
    position: int = 0  # tokens of the answer before the first of these draws
    late: bool = False  # its one token is what the step in flight draws; a placeholder stands here

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def piece(self) -> Piece:
        return self.start, self.count

    @property
    def samples(self) -> bool:
        return self.sampled > 0

    @property
    def drafts(self) -> tuple[int, ...]:
        """Guesses of what follows the sequence's last token, to be verified."""
        return self.tokens[self.count - self.sampled + 1 :] if self.sampled else ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """`decode` works have one token and their drafts, and always sample; `prefill` chunks when they reach the end."""

    decode: tuple[Work, ...] = ()
    prefill: tuple[Work, ...] = ()

    @property
    def work(self) -> tuple[Work, ...]:
        return self.decode + self.prefill

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


def next_work(sequence: Sequence, count: int) -> Work:
    """The next `count` pending tokens."""
    start = sequence.cached_len
    late = start == len(sequence.tokens)
    return Work(
        sequence,
        start,
        (0,) if late else tuple(sequence.tokens[start : start + count]),
        sampled=1 if count == sequence.pending else 0,
        position=sequence.answer_len + sequence.unread,
        late=late,
    )
