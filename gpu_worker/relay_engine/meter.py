"""Measured rates of a node, from what passes through. Pure: time is an argument."""

import dataclasses

WEIGHT = 0.2  # of the newest measurement
WINDOW_S = 0.5


@dataclasses.dataclass
class Meter:
    """EWMA of tokens a second; `decode_rate` is that of the whole node, over times when it was busy."""

    prefill_rate: float = 1000.0  # until measured
    decode_rate: float = 50.0
    _tokens: int = 0
    _since: float | None = None

    def busy(self, now: float) -> None:
        """The first sequence starts to produce."""
        if self._since is None:
            self._since, self._tokens = now, 0

    def idle(self) -> None:
        self._since = None

    def prefilled(self, prompt_tokens: int, took_s: float) -> None:
        if took_s > 0:
            self.prefill_rate += WEIGHT * (prompt_tokens / took_s - self.prefill_rate)

    def decoded(self, tokens: int, now: float) -> None:
        if self._since is None:
            self._since = now
        self._tokens += tokens
        if now - self._since >= WINDOW_S:
            self.decode_rate += WEIGHT * (self._tokens / (now - self._since) - self.decode_rate)
            self._since, self._tokens = now, 0
