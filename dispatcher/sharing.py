"""Which queues a dispatcher looks at: those of its models by rendezvous, and any whose head has waited too long.

A wrong guess is harmless, because `assign` checks every pick; sharing only keeps dispatchers from doing the same work.
"""

from collections.abc import Iterable

from bus.codec.wire import QueueView
from bus.ids import rendezvous
from bus.keys import QueueName, queue_model

HOLDER_PREFIX = "dispatcher:"  # of a dispatcher's name among the leases


class Share:
    """The queues of one dispatcher among the live ones; all queues of a model have the same owner."""

    def __init__(self, me: str, holders: Iterable[str] = ()) -> None:
        """holders: who has a lease now. `me` always counts: a lost lease must not stop the work."""
        self.me = me
        self.members = tuple(sorted({me, *(one for one in holders if one.startswith(HOLDER_PREFIX))}))
        self._owned: dict[str, bool] = {}

    def owns(self, queue: QueueName) -> bool:
        if len(self.members) == 1:
            return True
        model = queue_model(queue)
        owned = self._owned.get(model)
        if owned is None:
            owned = self._owned[model] = rendezvous(model, list(self.members))[0] == self.me
        return owned

    def serves(self, view: QueueView, now_ms: int, take_over_ms: int) -> bool:
        """Its own queue, or one whose head was added longer ago than its owner may need, by the server's clock."""
        return bool(view.heads) and (self.owns(view.queue) or now_ms - view.heads[0].queued_ms > take_over_ms)
