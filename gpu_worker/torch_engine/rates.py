"""How fast the engine is, from what its steps took. Pure."""

import dataclasses

WEIGHT = 0.1  # of the newest step in the moving averages
CHUNK_LEAST = 8  # fewer rows cost about as much as these
CHUNK_S = 0.5  # a longer chunk computes no faster, and whoever could be answered in between would wait for it
CHUNK_TELLING = 16  # shorter chunks say less about the prefill rate


@dataclasses.dataclass
class Rates:
    """Tokens per second, moving averages. A step with both kinds of work is split by what decode steps take alone."""

    prefill_rate: float = 0.0
    decode_rate: float = 0.0  # of the whole engine at its recent batch
    decode_step_s: float = 0.0
    decode_rows: float = 0.0  # of the steps that decode_step_s is about
    sequence_tokens: float = 512.0  # what a finished sequence held, for the capacity

    def observe(self, *, prefill_tokens: int, decode_rows: int, seconds: float) -> None:
        if seconds <= 0:
            return
        if not prefill_tokens and decode_rows:
            self.decode_step_s = _average(self.decode_step_s, seconds)
            self.decode_rows = _average(self.decode_rows, decode_rows)
            self.decode_rate = _average(self.decode_rate, decode_rows / seconds)
        elif prefill_tokens:
            for_decode = min(self.expected_step_s(decode_rows), seconds / 2)
            weight = WEIGHT * min(1.0, prefill_tokens / CHUNK_TELLING)
            self.prefill_rate = _average(self.prefill_rate, prefill_tokens / (seconds - for_decode), weight)

    def expected_step_s(self, rows: int) -> float:
        """Of a decode step; each row more than lately costs at least what a row of a prompt costs."""
        if not rows or not self.decode_step_s or not self.prefill_rate:
            return self.decode_step_s if rows else 0.0
        return self.decode_step_s + max(0.0, rows - self.decode_rows) / self.prefill_rate

    def observe_finished(self, tokens: int) -> None:
        self.sequence_tokens = _average(self.sequence_tokens, tokens)


def prompt_budget(rates: Rates, *, chunk_max: int, answering: int, arriving: int) -> int:
    """Prompt tokens of the next step.

    So few that the `answering` sequences wait about two of their token intervals more; while more prompts are
    `arriving` than that, in proportion longer, since all of these wait too. In any case about CHUNK_S.
    """
    if not rates.prefill_rate:
        return chunk_max
    seconds = CHUNK_S
    if answering and rates.decode_step_s:
        patience = 2 * max(1.0, arriving / answering)
        seconds = min(CHUNK_S, patience * rates.expected_step_s(answering))
    return min(chunk_max, max(CHUNK_LEAST, int(rates.prefill_rate * seconds)))


def _average(before: float, new: float, weight: float = WEIGHT) -> float:
    return new if before == 0.0 else before + weight * (new - before)


def capacity_now(*, slots: int, present: int, free_tokens: int, sequence_tokens: float) -> int:
    """Sequences that can be held: those present and as many more as free slots and free blocks let in; at least one."""
    room = min(slots - present, int(free_tokens / max(sequence_tokens, 1.0)))
    return max(1, present + max(0, room))
