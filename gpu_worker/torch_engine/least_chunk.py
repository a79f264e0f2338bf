"""How short a prompt's chunks may become beside running answers.

Pure. A chunk has a price that does not depend on its tokens: on a GPU a step with one launches each operation where a
step of answers alone is replayed. Where that price takes all that the answers were promised, or more, chunks of one
token would keep them waiting as long as chunks of a hundred, and would come two thousand times. So no chunk is shorter
than what costs about as much as the shortest. That is measured, size by size: to conclude it from the model of a
step's time, that would have to have seen the very sizes which are not tried while it thinks them too long.
"""

import statistics
from collections import deque

SHORTEST = 2  # tokens; one alone is a row like those of the answers, and may be replayed with them
LONGEST = 512
KEPT = 3  # steps of a size that are remembered and needed before twice as many are tried
LONGER, SHORTER = 1.1, 1.3  # times the shortest chunk's cost: up to it twice as many tokens, beyond it half as many
AGAIN = 128  # steps with prompts after which a size that was too long is tried again, and the shortest measured again


class LeastChunk:
    def __init__(self) -> None:
        self._size = SHORTEST
        self._costs: dict[int, deque[float]] = {}
        self._wait = 0  # steps until a longer one may be tried
        self._age = 0  # steps since the shortest was measured: late ones then must not count for ever

    @property
    def tokens(self) -> int:
        return SHORTEST if self._age >= AGAIN else self._size

    def observe(self, tokens: int, added_s: float) -> None:
        """A step with answers and so many prompt tokens, and by how much it took longer than one without."""
        self._wait = max(0, self._wait - 1)
        self._age = 0 if tokens == SHORTEST else self._age + 1
        if tokens not in (SHORTEST, self._size):
            return
        costs = self._costs.setdefault(tokens, deque(maxlen=KEPT))
        costs.append(added_s)
        if tokens != self._size:
            return
        times = statistics.median(costs) / min(self._costs[SHORTEST])
        if times > SHORTER and tokens > SHORTEST:
            self._size, self._wait = tokens // 2, AGAIN
            costs.clear()
        elif times <= LONGER and len(costs) == KEPT and not self._wait:
            self._size = min(2 * tokens, LONGEST)

    def forget(self) -> None:
        """The machine's speed has changed."""
        self._size, self._wait, self._age = SHORTEST, 0, 0
        self._costs.clear()
