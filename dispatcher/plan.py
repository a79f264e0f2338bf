"""Which waiting jobs go where in one pass: pure, from one look at queue heads and nodes.

Priority 0 comes first over all models. Within a priority the models take turns, one job each, so that a model with a
long queue does not take a shared node from the others. Every choice counts against its node at once, so a batch
spreads. A job that no node can take now is passed over and stays where it is in its queue.
"""

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from bus.codec.wire import CellView, QueuedJob, QueueView
from bus.ids import ModelName
from bus.jobs import is_able
from bus.keys import QueueName, queue_model, queue_priority
from dispatcher.rank import Draw, Node, Score, able, is_open, promise, rank, rank_open

ASSIGN_MAX = 64  # jobs of one assign call
SHORTLIST = (
    64  # with more nodes than this, only the least loaded are compared for ordinary jobs: one may each be filled
)


class Choice(msgspec.Struct, frozen=True):
    """A job and the nodes to try in order, each with the terms of its score."""

    queue: QueueName
    job: QueuedJob
    scores: Sequence[Score]


def plan(
    queues: Sequence[QueueView],
    nodes: Mapping[ModelName, Sequence[Node]],
    now_ms: int,
    turn: int,
    draw: Draw,
    limit: int = ASSIGN_MAX,
) -> list[Choice]:
    """Choose nodes for at most `limit` jobs. The nodes' load grows with the choices: pass a fresh look's.

    nodes: by model; a node that serves two models is one object in both lists.
    turn: grows with each pass and moves the first turn on to the next model.
    """
    room: dict[tuple[ModelName, tuple[str, ...]], list[Node]] = {}  # looked through once a pass, not once a job
    by_id = {node.node: node for every in nodes.values() for node in every}
    choices: list[Choice] = []
    for queue, model, job in in_turn(queues, turn):
        ordinary = not (job.alone or job.avoid or job.resume)
        if ordinary:
            alike = model, job.needs
            if alike not in room:
                room[alike] = shortlist(nodes.get(model, ()), now_ms, job.needs)
            ranked = rank_open(job, room[alike], draw)
        else:
            ranked = rank(job, nodes.get(model, ()), now_ms, draw)
        if not ranked:
            continue
        choices.append(Choice(queue, job, ranked))
        best = by_id[ranked[0].node]
        promise(best, job)
        if not is_open(best, now_ms):
            room = {other: [node for node in some if node is not best] for other, some in room.items()}
        if len(choices) == limit:
            break
    return choices


def in_turn(queues: Sequence[QueueView], turn: int) -> Iterator[tuple[QueueName, ModelName, QueuedJob]]:
    """Entries in the order in which they are served: by priority, then one of each model at a time."""
    by_priority: dict[int, list[tuple[ModelName, QueueView]]] = {}
    for one in queues:
        by_priority.setdefault(queue_priority(one.queue), []).append((queue_model(one.queue), one))
    for _, peers in sorted(by_priority.items()):
        peers.sort(key=lambda peer: peer[0])
        first = turn % len(peers)
        order = peers[first:] + peers[:first]
        for place in range(max(len(view.heads) for _, view in order)):
            for model, view in order:
                if place < len(view.heads):
                    yield view.queue, model, view.heads[place]


def unserved(queues: Sequence[QueueView], view: CellView) -> list[tuple[QueueName, QueuedJob]]:
    """Jobs that wait in vain: a node of their model lives, and none that is known can do what they ask for.

    One that is away counts, because it may come back; with none at all the jobs wait as all others do.
    """
    found: list[tuple[QueueName, QueuedJob]] = []
    for queue in queues:
        asking = [job for job in queue.heads if job.needs]
        nodes = view.nodes_of(queue_model(queue.queue)) if asking else []
        if any(node.alive and node.leased and node.state == "up" for node in nodes):
            found += [
                (queue.queue, job)
                for job in asking
                if not any(is_able(n.can, n.cannot, job.needs) and n.node not in job.refused for n in nodes)
            ]
    return found


def shortlist(nodes: Sequence[Node], now_ms: int, needs: Collection[str]) -> list[Node]:
    """The nodes worth comparing for ordinary jobs with these needs: open, able, of a large fleet the least loaded."""
    usable = [node for node in nodes if is_open(node, now_ms)]
    if needs:
        usable = able(usable, needs)
    return heapq.nsmallest(SHORTLIST, usable, key=lambda node: node.base_ms) if len(usable) > SHORTLIST else usable
