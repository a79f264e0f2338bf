"""How late the worker's event loop is: whether a busy engine leaves it the time to speak."""

import asyncio
import time
from collections import deque

TICK_S = 0.02
WINDOW = 500  # ticks that the figures are about: 10 s


class LoopLag:
    """Sleeps a tick again and again, and remembers how much later than due it went on."""

    def __init__(self) -> None:
        self._late_s: deque[float] = deque(maxlen=WINDOW)

    @property
    def p99_ms(self) -> float:
        """99 of 100 times within the last 10 s it was no later than this; 0 before the first tick."""
        late = sorted(self._late_s)
        return 1000 * late[int(0.99 * (len(late) - 1))] if late else 0.0

    @property
    def max_ms(self) -> float:
        return 1000 * max(self._late_s, default=0.0)

    def note(self, late_s: float) -> None:
        self._late_s.append(max(0.0, late_s))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due_s = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.note(time.monotonic() - due_s)
