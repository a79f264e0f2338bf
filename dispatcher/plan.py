"""Which waiting jobs go where in one pass: pure, from one look at queue heads and nodes.

Priority 0 comes first over all models. Within a priority the models take turns, one job each, so that a model with a
long queue does not take a shared node from the others. Every choice counts against its node at once, so a batch
spreads. A job that no node can take now is passed over and stays where it is in its queue.
"""

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from bus.codec.wire import CellView, NodeView, QueuedJob, QueueView
from bus.ids import ModelName
from bus.jobs import is_able
from bus.keys import QueueName, queue_model, queue_priority
from dispatcher.rank import Draw, Node, Score, able, is_open, larger, not_refused, promise, rank, rank_open

ASSIGN_MAX = 64  # jobs of one assign call
SHORTLIST = (
    64  # with more nodes than this, only the least loaded are compared for ordinary jobs: one may each be filled
)


class Choice(msgspec.Struct, frozen=True):
    """A job and the nodes to try in order, each with the terms of its score."""

    queue: QueueName
    job: QueuedJob
    scores: Sequence[Score]


class Room(msgspec.Struct):
    """The nodes for ordinary jobs with the same needs."""

    near: list[Node]  # compared for each job
    far: list[Node]  # of a large fleet with unequal contexts the others: for jobs that seem too long for the near ones
    long: dict[tuple[int, float], list[Node]]  # the least loaded of these with contexts in such a range, once asked for

    def for_long(self, job: QueuedJob, now_ms: int) -> list[Node]:
        """Those that seem to hold prompt and answer; where they are few, also those that hold the prompt."""
        prompt, whole = rounded_up(job.est_prompt + 1), rounded_up(job.est_prompt + job.est_new)
        found = self._holding(whole, math.inf)
        if len(found) < SHORTLIST:
            found = found + self._holding(prompt, whole - 1)
        return [node for node in found if is_open(node, now_ms)]

    def _holding(self, least: int, most: float) -> list[Node]:
        if (least, most) not in self.long:
            found = (node for node in self.far if least <= node.holds <= most)
            self.long[least, most] = heapq.nsmallest(SHORTLIST, found, key=lambda node: node.base_ms)
        return self.long[least, most]


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
    room: dict[tuple[ModelName, tuple[str, ...]], Room] = {}  # looked through once a pass, not once a job
    by_id = {node.node: node for every in nodes.values() for node in every}
    choices: list[Choice] = []
    for queue, model, job in in_turn(queues, turn):
        ordinary = not (job.alone or job.avoid or job.resume or job.outgrown is not None)
        if ordinary:
            alike = model, job.needs
            if alike not in room:
                room[alike] = shortlist(nodes.get(model, ()), now_ms, job.needs)
            some = room[alike]
            ranked = rank_open(job, some.near, draw, others=partial(some.for_long, job, now_ms) if some.far else None)
        else:
            ranked = rank(job, nodes.get(model, ()), now_ms, draw)
        if not ranked:
            continue
        choices.append(Choice(queue, job, ranked))
        best = by_id[ranked[0].node]
        promise(best, job)
        if not is_open(best, now_ms):
            for one in room.values():
                one.near = [node for node in one.near if node is not best]
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


def unserved(
    queues: Sequence[QueueView], view: CellView, living: Mapping[ModelName, Sequence[Node]]
) -> list[tuple[QueueName, QueuedJob]]:
    """Jobs that wait in vain: a node of their model lives, and none that is known can do what they ask for.

    One that is away counts, because it may come back; with none at all the jobs wait as all others do. Of those that
    outgrew a context, all for which no larger one lives: the script knows how long each of them waits for one.
    """
    found: list[tuple[QueueName, QueuedJob]] = []
    for queue in queues:
        model = queue_model(queue.queue)
        asking = [job for job in queue.heads if job.needs or job.outgrown is not None]
        nodes = living.get(model, ()) if asking else ()
        if nodes:
            known = view.nodes_of(model)
            found += [(queue.queue, job) for job in asking if _waits_in_vain(job, known, nodes)]
    return found


def _waits_in_vain(job: QueuedJob, known: Sequence[NodeView], living: Sequence[Node]) -> bool:
    if job.outgrown is not None:
        return not larger(not_refused(able(living, job.needs), job), job)
    return bool(job.needs) and not any(
        is_able(node.can, node.cannot, job.needs) and node.node not in job.refused for node in known
    )


def shortlist(nodes: Sequence[Node], now_ms: int, needs: Collection[str]) -> Room:
    """The nodes worth comparing for ordinary jobs with these needs: open, able, of a large fleet the least loaded."""
    usable = [node for node in nodes if is_open(node, now_ms)]
    if needs:
        usable = able(usable, needs)
    if len(usable) <= SHORTLIST:
        return Room(usable, [], {})
    near = heapq.nsmallest(SHORTLIST, usable, key=lambda node: node.base_ms)
    if len({node.context for node in usable}) == 1:
        return Room(near, [], {})
    chosen = {node.node for node in near}
    return Room(near, [node for node in usable if node.node not in chosen], {})


def rounded_up(tokens: int) -> int:
    """To one of four sizes for each power of two, so that jobs of like length share what was looked for."""
    step = 1 << max(0, tokens.bit_length() - 3)
    return -(-tokens // step) * step
