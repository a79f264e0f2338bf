"""What the last looks showed of the nodes, for jobs that are assigned without another look.

A new job's wake carries its queue entry. While the nodes of its model have been looked at a moment ago, and nothing
else of the model waits, the job can be assigned at once: one round trip less. The board may be wrong about a node by
what happened since; `assign` checks, and a refusal leads to a look.
"""

from collections.abc import Iterable, Mapping

from bus.codec.wire import CellView, QueuedJob
from bus.ids import ModelName
from bus.keys import QueueName, queue_model
from dispatcher.rank import Node, is_open

FRESH_MS = 100  # older views are looked at again: loads that only grow here shrink there


class Board:
    """Nodes by model with the time of their look, and how far each queue has been seen."""

    def __init__(self, fresh_ms: float = FRESH_MS) -> None:
        self.fresh_ms = fresh_ms
        self._nodes: dict[ModelName, list[Node]] = {}
        self._looked_ms: dict[ModelName, float] = {}
        self._seen: dict[QueueName, tuple[int, int]] = {}  # the newest entry that a look has shown
        self._ahead_ms = 0.0  # the server's clock, less ours

    def remember(self, view: CellView, nodes: Mapping[ModelName, list[Node]], clock_ms: float) -> None:
        """After a look, with the pass' own choices already counted against the nodes."""
        self._ahead_ms = view.now_ms - clock_ms
        for one in view.queues:
            model = queue_model(one.queue)
            self._nodes[model] = nodes.get(model, [])
            self._looked_ms[model] = clock_ms
            if one.heads:
                self._seen[one.queue] = order_of(one.heads[-1].entry_id)

    def now_ms(self, clock_ms: float) -> int:
        """The server's clock, as far as we know."""
        return int(clock_ms + self._ahead_ms)

    def is_news(self, queue: QueueName, job: QueuedJob) -> bool:
        """Whether no look has shown this entry: the wake of a job that a look found first comes late."""
        return order_of(job.entry_id) > self._seen.get(queue, (0, 0))

    def nodes_for(self, models: Iterable[ModelName], clock_ms: float) -> dict[ModelName, list[Node]] | None:
        """Nodes of each of the models, looked at within fresh_ms and with room; None if one of them needs a look."""
        found: dict[ModelName, list[Node]] = {}
        for model in models:
            if clock_ms - self._looked_ms.get(model, -self.fresh_ms) >= self.fresh_ms:
                return None
            nodes = self._nodes[model]
            if not any(is_open(node, self.now_ms(clock_ms)) for node in nodes):
                return None
            found[model] = nodes
        return found


def order_of(entry_id: str) -> tuple[int, int]:
    """Entry ids compare as numbers."""
    moment, _, sequence = entry_id.partition("-")
    return int(moment), int(sequence)
