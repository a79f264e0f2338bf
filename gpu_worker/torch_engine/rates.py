"""How fast the engine is, from what its steps took; how many prompt tokens the next takes; how many sequences fit.

Pure. `StepTime` knows how long a step of any content takes. From it follow the tokens a second that the dispatcher
scores nodes by: its score adds the wait for promised prompt tokens and for promised new tokens, so of a step with both
kinds of work each gets its share of the time, and neither rate counts the other's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from gpu_worker.torch_engine.interval import OwnInterval
from gpu_worker.torch_engine.least_chunk import SHORTEST, LeastChunk
from gpu_worker.torch_engine.step_time import Load, Piece, StepTime, load_of

FOLLOW = 0.1  # weight of the newest value in the moving averages
PREFILL_MEMORY = 2048  # prompt tokens after which what was measured before counts half
CHUNK_S = 0.5  # a longer chunk computes hardly faster, and whoever could be answered in between would wait for it
CHUNK_MOST_S = 2.0  # on machines where it does: large models, whose weights take that long to read
STALL = 2.0  # of its own token intervals that a running answer waits for a prompt, per step, where nothing else is said
ADDED_LEAST = 0.02  # of the answers' interval: what a chunk adds at least, as far as a measurement can tell
AIM = 0.9  # of that: what is between two steps takes time too
CAREFUL = 2.33  # standard deviations that one step in a hundred takes longer than expected: all others keep the promise
NOISE_HEEDED = 0.1  # a machine noisier than this stalls answers itself; prompts must get on nevertheless
SETTLED_S = 1.0  # after its first token an answer waits for prompts that it came with; never for those that came later
EVEN = 0.8  # of the prompt tokens per second of a longer step: a shorter one is as good


class Rates:
    """Of one engine. Nothing is forgotten while it idles: it is as fast afterwards as it was before."""

    def __init__(self, stall: float = STALL) -> None:
        self.stall = stall
        self.step_time = StepTime()
        self._interval = OwnInterval(self.step_time)
        self._least = LeastChunk()
        self.sequence_tokens = 512.0  # what a finished sequence held, for the capacity
        self._prompt_tokens = 0.0  # lately computed ones, those from the prefix cache left out ...
        self._prompt_s = 0.0  # ... and what they took
        self._row_tokens = 1.0  # that a decode piece gives its answer: more with accepted drafts

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 while unknown."""
        return self._prompt_tokens / self._prompt_s if self._prompt_s else 0.0

    def decode_rate(self, answers: Sequence[Piece]) -> float:
        """New tokens per second of the engine with these answers; with a typical one if there is none. 0: unknown."""
        if not self.step_time.steps:
            return 0.0
        pieces = answers or [(int(self.sequence_tokens / 2), 1)]
        return len(pieces) * self._row_tokens / self.step_time.expected_s(load_of(pieces))

    def observe(
        self, *, decode: Sequence[Piece], prefill: Sequence[Piece], seconds: float, new_tokens: int | None = None
    ) -> None:
        """One step. new_tokens: that its decode pieces gave their answers; each one if not said."""
        if not (decode or prefill) or not 0.0 < seconds < math.inf:
            return
        load = load_of(decode, prefill)
        believed_s = self.step_time.observe(load, seconds)
        if decode:
            if self._interval.observe(load, seconds):
                self._least.forget()
            self._observe_chunk(decode, sum(count for _, count in prefill), seconds)
            given = len(decode) if new_tokens is None else new_tokens
            self._row_tokens = _follow(self._row_tokens, given / len(decode))
        if prefill:
            self._observe_prefill(decode, prefill, believed_s)

    def prompt_budget(
        self, *, chunk_max: int, answers: Sequence[Piece], settled: int, prompts: Iterable[Piece], arriving: int
    ) -> int:
        """As the function says; 0 if the next step should be without prompts, to measure what it takes."""
        if 0 < arriving <= settled and self._interval.outdated:
            return 0
        return prompt_budget(
            self.step_time,
            interval_s=self._interval.seconds(load_of(answers)) if answers and self.step_time.steps else 0.0,
            chunk_max=chunk_max,
            answers=answers,
            settled=settled,
            prompts=prompts,
            arriving=arriving,
            stall=self.stall,
            least=self._least.tokens,
        )

    def _observe_chunk(self, decode: Sequence[Piece], tokens: int, seconds: float) -> None:
        if tokens:
            interval_s = self._interval.seconds(load_of(decode))
            self._least.observe(tokens, max(seconds - interval_s, ADDED_LEAST * interval_s))

    def _observe_prefill(self, decode: Sequence[Piece], prefill: Sequence[Piece], seconds: float) -> None:
        """Sums, so that a short chunk weighs as much as it took; of a mixed step the decode pieces' share is theirs."""
        expected_s = self.step_time.expected_s
        share = 1 - expected_s(load_of(decode)) / expected_s(load_of(decode, prefill)) if decode else 1.0
        tokens = sum(count for _, count in prefill)
        kept = 0.5 ** (tokens / PREFILL_MEMORY)
        self._prompt_tokens = kept * self._prompt_tokens + tokens
        self._prompt_s = kept * self._prompt_s + seconds * share

    def observe_finished(self, tokens: int) -> None:
        self.sequence_tokens = _follow(self.sequence_tokens, tokens)


def prompt_budget(
    step_time: StepTime,
    *,
    interval_s: float,
    chunk_max: int,
    answers: Sequence[Piece],
    settled: int,
    prompts: Iterable[Piece],
    arriving: int,
    stall: float = STALL,
    least: int = SHORTEST,
) -> int:
    """Prompt tokens of the next step, at least 1.

    interval_s: what a step takes with the answers alone; answers: their pieces; settled: how many of them had their
    first token SETTLED_S ago, or before the first of the prompts came; prompts: (computed, still to compute) of each
    prompt in the order in which they are taken; arriving: how many wait for their first token.

    So few tokens that the answers wait at most `stall` of their own intervals longer; while more prompts arrive than
    settled answers run, in proportion longer, since all of these wait too. In any case about CHUNK_S, and no further
    than to the end of a prompt if that is about as fast: its first token need not wait for a part of the next prompt.
    Never fewer than `least`, which cost about as much as any chunk does.
    """
    wanted = list(first_tokens(prompts, chunk_max))
    most = max(1, sum(count for _, count in wanted))
    if not step_time.steps:
        return most

    def load(tokens: int) -> Load:
        return load_of(answers, first_tokens(wanted, tokens))

    chunk_s = max(CHUNK_S, min(CHUNK_MOST_S, step_time.expected_s(load(1)) / (1 - EVEN)))
    patience_s = stall * AIM * max(1.0, arriving / settled) * interval_s if settled else chunk_s
    limit_s = interval_s + min(chunk_s, patience_s)
    noise = min(step_time.noise, NOISE_HEEDED)

    def fits(tokens: int) -> bool:
        doubt = math.hypot(step_time.doubt(load(tokens), load(0)), noise) if arriving <= settled else 0.0
        return step_time.expected_s(load(tokens)) * math.exp(CAREFUL * doubt) <= limit_s

    def token_s(tokens: int) -> float:
        return step_time.expected_s(load(tokens)) / tokens

    chosen = max(_largest(most, fits), min(least, most))
    return _first_end([count for _, count in wanted], chosen, token_s)


def first_tokens(prompts: Iterable[Piece], tokens: int) -> Iterator[Piece]:
    """The pieces that the next so many tokens of the prompts are."""
    for start, count in prompts:
        if tokens <= 0:
            return
        yield start, min(count, tokens)
        tokens -= count


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1..most that fits, if smaller ones always fit better; 1 if none does."""
    if fits(most):
        return most
    least = 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _first_end(counts: Iterable[int], most: int, token_s: Callable[[int], float]) -> int:
    """Of 1..most tokens of pieces in a row as many as end a piece, if a token of them takes about what one of all does.

    token_s: seconds per token of a step of so many.
    """
    allowed_s = token_s(most) / EVEN
    ends = (end for end in accumulate(counts) if end < most)
    return next((end for end in ends if token_s(end) <= allowed_s), most)


def _follow(before: float, new: float) -> float:
    return before + FOLLOW * (new - before)


def capacity_now(
    *, slots: int, running: int, waiting: int, free_tokens: int, waiting_tokens: int, sequence_tokens: float
) -> int:
    """Sequences that can be held, 1..slots: those that run, those that wait, as many more as free blocks let in.

    waiting_tokens: what the waiting ones will hold; when that is more than is free, only their share counts as held.
    """
    held = running + waiting * min(1.0, free_tokens / waiting_tokens) if waiting_tokens else running + waiting
    room = max(0, free_tokens - waiting_tokens) / max(sequence_tokens, 1.0)
    return max(1, min(slots, int(held + room)))
