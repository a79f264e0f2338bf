"""How fast the engine is, from what its steps took. Pure."""

import dataclasses

WEIGHT = 0.1  # of the newest step in the moving averages
CHUNK_LEAST = 32  # fewer rows would read all weights for hardly anything


@dataclasses.dataclass
class Rates:
    """Tokens per second, moving averages. A step with both kinds of work is split by what decode steps take alone."""

    prefill_rate: float = 0.0
    decode_rate: float = 0.0  # of the whole engine at its recent batch
    decode_step_s: float = 0.0
    sequence_tokens: float = 512.0  # what a finished sequence held, for the capacity

    def observe(self, *, prefill_tokens: int, decode_rows: int, seconds: float) -> None:
        if seconds <= 0:
            return
        if not prefill_tokens and decode_rows:
            self.decode_step_s = _average(self.decode_step_s, seconds)
            self.decode_rate = _average(self.decode_rate, decode_rows / seconds)
        elif prefill_tokens:
            for_decode = min(self.decode_step_s, seconds / 2) if decode_rows else 0.0
            self.prefill_rate = _average(self.prefill_rate, prefill_tokens / (seconds - for_decode))

    def observe_finished(self, tokens: int) -> None:
        self.sequence_tokens = _average(self.sequence_tokens, tokens)


def prompt_budget(rates: Rates, *, chunk_max: int, answers_running: bool) -> int:
    """Prompt tokens of the next step: so few that running answers wait about two of their token intervals more.

    Nobody waits: the whole chunk, which computes fastest.
    """
    if not answers_running or not rates.decode_step_s or not rates.prefill_rate:
        return chunk_max
    return min(chunk_max, max(CHUNK_LEAST, int(rates.prefill_rate * 2 * rates.decode_step_s)))


def _average(before: float, new: float) -> float:
    return new if before == 0.0 else before + WEIGHT * (new - before)


def capacity_now(*, slots: int, present: int, free_tokens: int, sequence_tokens: float) -> int:
    """Sequences that can be held: those present and as many more as free slots and free blocks let in; at least one."""
    room = min(slots - present, int(free_tokens / max(sequence_tokens, 1.0)))
    return max(1, present + max(0, room))
