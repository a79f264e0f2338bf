"""Prompt lookup: what followed the last few tokens when they were seen before is guessed to follow again. Pure.

A guess costs a row of the step's batch and is worth a step if it is right: edits, quotes, lists and code repeat
themselves. The engine draws its own token at each guessed place and keeps guesses only as far as they are what it
draws, so answers are the same with and without, greedy and sampled (Saxena, prompt lookup decoding, 2023; Leviathan et
al., speculative decoding, 2023, with draws that are fixed by seed and position).

Whoever guesses badly guesses less (`Trust`): free text loses next to nothing. And where a row costs about as much as it
does to answer somebody else, in a full batch, only guesses that are mostly right are made (`Worth`).
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

MATCH_LEAST = 2  # tokens that must have been seen before
MATCH_MOST = 4  # of equal matches the latest one counts, so longer ones need not be told apart
TRIED_MAX = 16  # earlier places looked at
INDEXED_MAX = 4096  # tokens looked at for the first time in one step, some milliseconds; a longer prompt takes several
PAUSE_LEAST, PAUSE_MOST = 8, 256  # tokens without a guess after the second failure in a row
SHARE_FIRST = 0.5  # of guesses that are right, before any was made
FOLLOW, FORGET = 0.1, 0.01  # weight of the newest share; of the first one, in a step without guesses


class Lookup:
    """Where each pair of tokens of one sequence was seen; grows with the sequence, a few operations a token."""

    def __init__(self) -> None:
        self._indexed = 0  # pairs (tokens[n - 1], tokens[n]) are known for 1 <= n < _indexed
        self._latest: dict[tuple[int, int], int] = {}  # pair -> place of its second token
        self._before: list[int] = []  # of each place: the one before it with the same pair; 0 = none

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow. `tokens` are those of the last call, and perhaps more behind them."""
        if most < 1 or len(tokens) <= MATCH_LEAST:
            return ()
        self._index(tokens)
        place = self._best(tokens)
        if place is None:
            return ()
        period = len(tokens) - place  # a match near the end repeats: what it would copy is then itself a guess
        return tuple(tokens[place + n % period] for n in range(most))

    def _index(self, tokens: Sequence[int]) -> None:
        """All pairs but the last, which would only find itself."""
        start = max(self._indexed, 1)
        end = min(len(tokens) - 1, start + INDEXED_MAX)
        self._before += [0] * (end - len(self._before))
        for place, pair in enumerate(pairwise(tokens[start - 1 : end]), start):
            self._before[place] = self._latest.get(pair, 0)
            self._latest[pair] = place
        self._indexed = end

    def _best(self, tokens: Sequence[int]) -> int | None:
        """The place behind the longest match of the tail, the latest of equals."""
        place = self._latest.get((tokens[-2], tokens[-1]), 0)
        longest, found = 0, None
        for _ in range(TRIED_MAX):
            if not place or longest == MATCH_MOST:
                break
            length = _match(tokens, place)
            if length > longest:
                longest, found = length, place + 1
            place = self._before[place]
        return found


def _match(tokens: Sequence[int], place: int) -> int:
    """How many tokens up to `place` are the same as the last ones; the first two are known to be."""
    length = MATCH_LEAST
    while length < min(MATCH_MOST, place + 1) and tokens[place - length] == tokens[-1 - length]:
        length += 1
    return length


@dataclasses.dataclass(frozen=True)
class Trust:
    """How much one sequence's guesses have earned: `width` tokens a step, none before the answer has `resume_at`."""

    width: int
    failures: int = 0  # in a row: steps in which no guess was right
    pause: int = PAUSE_LEAST
    resume_at: int = 0


def judged(trust: Trust, *, drafted: int, accepted: int, most: int, answer_len: int) -> Trust:
    """All right: twice as many next time. Some: one more than were right. None, twice in a row: a longer pause."""
    if accepted == drafted:
        return Trust(min(most, 2 * trust.width), 0, PAUSE_LEAST, 0)
    if accepted:
        return Trust(min(most, accepted + 1), 0, max(PAUSE_LEAST, trust.pause // 2), 0)
    width, failures = max(1, trust.width // 2), trust.failures + 1
    if failures < 2:
        return dataclasses.replace(trust, width=width, failures=failures)
    return Trust(width, failures, min(PAUSE_MOST, 2 * trust.pause), answer_len + trust.pause)


class Guesser:
    """The guesses of one sequence. most: of one step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lookup = Lookup()
        self.trust = Trust(width=min(2, most))

    def eager(self, answer_len: int) -> bool:
        return answer_len >= self.trust.resume_at

    def guess(self, tokens: Sequence[int], answer_len: int, room: int) -> tuple[int, ...]:
        """room: the most that may be computed now."""
        if not self.eager(answer_len):
            return ()
        return self._lookup.guess(tokens, min(room, self.trust.width))

    def verified(self, drafted: int, accepted: int, answer_len: int) -> None:
        self.trust = judged(self.trust, drafted=drafted, accepted=accepted, most=self._most, answer_len=answer_len)


class Worth:
    """What guesses are worth to the engine: the share of them that was right lately."""

    def __init__(self) -> None:
        self.share = SHARE_FIRST

    def observe(self, drafted: int, accepted: int) -> None:
        """One step. Without guesses the share slowly becomes unknown again: else one bad hour would end them all."""
        if drafted:
            self.share += FOLLOW * (accepted / drafted - self.share)
        else:
            self.share += FORGET * (SHARE_FIRST - self.share)

    def pays(self, *, answers: int, step_s: float, row_s: float) -> bool:
        """Whether a guess brings at least the tokens that its time would bring otherwise.

        step_s: what a step with so many answers takes; row_s: what one more row adds.
        """
        return self.share * step_s >= answers * row_s


def agreed(drafts: Sequence[int], drawn: Sequence[int | None]) -> int:
    """How many drafts are what was drawn in their place: the draw behind the last of these holds too."""
    return next((n for n, (draft, token) in enumerate(zip(drafts, drawn, strict=False)) if draft != token), len(drafts))
