"""Which queues a dispatcher looks at: its own by rendezvous, and any whose head has waited too long.

A wrong guess is harmless, because `assign` checks every pick; sharing only keeps dispatchers from doing the same work.
"""

from collections.abc import Collection, Sequence

from bus.ids import rendezvous


def own_queues(queues: Sequence[str], dispatchers: Collection[str], me: str) -> list[str]:
    """The queues that `me` owns among the live `dispatchers`; all of them when nobody else is known to live.

    `me` counts as live: a dispatcher whose lease the server has lost must not stop working over it.
    """
    if all(one == me for one in dispatchers):
        return list(queues)
    alive = sorted({*dispatchers, me})
    return [queue for queue in queues if rendezvous(queue, alive)[0] == me]


def waits_too_long(head_entry_id: str, now_ms: int, take_over_ms: int) -> bool:
    """Whether the entry at a queue's head was added longer ago than its owner may need, by the server's clock."""
    return now_ms - int(head_entry_id.partition("-")[0]) > take_over_ms
