"""Stop strings that never leak. Pure.

Text is shown as soon as it cannot be part of a stop string any more; a tail that could still become one is held back.
"""

from collections.abc import Sequence


class StopScanner:
    """shown: by an earlier attempt, which held nothing back. Its end may be the beginning of a stop string, which ends
    the answer as soon as it is whole; what was shown stays shown.
    """

    def __init__(self, stops: Sequence[str], shown: str = "") -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.stopped = False  # a stop string was seen; nothing is shown after it
        self._tail = ""  # seen, a proper prefix of some stop string
        self._shown = len(shown)  # characters at the beginning of the tail that were shown all the same
        self.feed(shown)

    @property
    def held(self) -> str:
        """Seen, not shown."""
        return self._tail[self._shown :]

    def feed(self, text: str) -> str:
        """What may be shown now. After a stop string: everything before its first occurrence, and nothing more."""
        if self.stopped or not self.stops:
            return "" if self.stopped else text
        seen = self._tail + text
        places = [at for stop in self.stops if (at := seen.find(stop)) >= 0]
        if places:
            self.stopped, self._tail = True, ""
            return seen[self._shown : min(places)]
        free = len(seen) - self._unsure_tail(seen)
        let_out = seen[self._shown : free]
        self._tail, self._shown = seen[free:], max(0, self._shown - free)
        return let_out

    def finish(self) -> str:
        """The answer ended without a stop string: the held tail is text after all."""
        rest, self._tail, self._shown = self.held, "", 0
        return rest

    def _unsure_tail(self, seen: str) -> int:
        longest = min(len(seen), max(len(stop) for stop in self.stops) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(seen[-n:]) for stop in self.stops)), 0)
