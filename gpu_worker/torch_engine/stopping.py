"""Stop strings that never leak. Pure.

Text is shown as soon as it cannot be part of a stop string any more; a tail that could still become one is held back.
"""

from collections.abc import Sequence


class StopScanner:
    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""  # seen, not shown: a proper prefix of some stop string
        self.stopped = False  # a stop string was seen; nothing is shown after it

    def feed(self, text: str) -> str:
        """What may be shown now. After a stop string: everything before its first occurrence, and nothing more."""
        if self.stopped or not self.stops:
            return "" if self.stopped else text
        seen = self.held + text
        places = [at for stop in self.stops if (at := seen.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return seen[: min(places)]
        keep = self._unsure_tail(seen)
        self.held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """The answer ended without a stop string: the held tail is text after all."""
        rest, self.held = self.held, ""
        return rest

    def _unsure_tail(self, seen: str) -> int:
        longest = min(len(seen), max(len(stop) for stop in self.stops) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(seen[-n:]) for stop in self.stops)), 0)
