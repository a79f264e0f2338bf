"""What a batch of node news amounts to: pure, and the same in whatever order the deliveries come.

Order is (epoch, stream entry id), never the order of arrival: several consumers read one stream, dead ones leave
backlogs, and an entry may be delivered twice. A fold therefore keeps a maximum per kind of news, so that it is a join:
commutative, associative, idempotent. Test: any permutation, any split over consumers, ends in the same state.

    register  (epoch e)   the node is e from now on; every one is answered, so none is dropped from a batch
    beat      (epoch e)   a worker's full state; recreates its node
    http_beat (no epoch)  an HTTP node's id; keeps a known node alive, creates nothing
    drain     (epoch e)   takes no more jobs
    bye       (epoch e)   left: nothing of epoch <= e revives it, whatever its entry id

Who may say http_beat and bye is known by the node's hash, not by a batch. So the newest of each sender is kept: another
key's beat must not take the place of the owner's.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from bus.ids import NodeId

EntryOrder = tuple[int, int]  # a stream entry id as numbers: milliseconds of the server, sequence
Kind = Literal["register", "beat", "http_beat", "drain", "bye"]
Status = Literal["unknown", "active", "inactive", "left"]


class News(msgspec.Struct, frozen=True, order=True):
    """One decoded entry of the `nodes` stream; sorts by (epoch, entry), an HTTP beat by its entry alone."""

    epoch: int
    entry: EntryOrder
    kind: Kind
    node: NodeId
    sender: str = ""  # the key that says so


class NodeState(msgspec.Struct, frozen=True):
    """The newest of each kind of news about one node; of beats over HTTP and departures, the newest of each sender."""

    register: News | None = None
    beat: News | None = None
    drain: News | None = None
    http_beats: frozenset[News] = frozenset()
    byes: frozenset[News] = frozenset()

    @property
    def epoch(self) -> int:
        """The newest epoch that lives; 0 if the node is unknown or has left."""
        left = max((one.epoch for one in self.byes), default=0)
        return max((one.epoch for one in (self.register, self.beat) if one and one.epoch > left), default=0)

    @property
    def last_sign(self) -> EntryOrder:
        """Entry id of the last sign of life of the living epoch; an HTTP beat counts after its registration."""
        living = [one.entry for one in (self.register, self.beat) if one and one.epoch == self.epoch]
        owner = self.register.sender if self.register else ""
        if living:
            first = min(living)
            living += [one.entry for one in self.http_beats if one.sender == owner and one.entry > first]
        return max(living, default=(0, 0))

    @property
    def draining(self) -> bool:
        return self.drain is not None and self.drain.epoch >= self.epoch > 0


Fold = dict[NodeId, NodeState]


def parse_entry_id(entry_id: str) -> EntryOrder:
    moment, _, sequence = entry_id.partition("-")
    return int(moment), int(sequence or 0)


def fold(state: NodeState, event: News) -> NodeState:
    """The state after one more delivery. Older or repeated news of a kind change nothing."""
    if event.kind == "http_beat":
        return msgspec.structs.replace(state, http_beats=_newest_of_each(state.http_beats, event))
    if event.kind == "bye":
        return msgspec.structs.replace(state, byes=_newest_of_each(state.byes, event))
    known: News | None = getattr(state, event.kind)
    return state if known is not None and known >= event else msgspec.structs.replace(state, **{event.kind: event})


def _newest_of_each(known: frozenset[News], event: News) -> frozenset[News]:
    mine = {one for one in known if one.sender == event.sender}
    return known - mine | {max(mine | {event})}


def fold_all(events: Iterable[News], start: Fold | None = None) -> Fold:
    states = dict(start or {})
    for event in events:
        states[event.node] = fold(states.get(event.node, NodeState()), event)
    return states


def status(state: NodeState, now_ms: int, ttl_ms: int) -> Status:
    """Active until the TTL after the last sign of life, counted from the sign's entry id: a backlog revives nobody."""
    if state.epoch == 0:
        return "left" if state.byes else "unknown"
    return "active" if now_ms - state.last_sign[0] < ttl_ms else "inactive"


def to_apply(events: Iterable[News]) -> list[News]:
    """What of a batch has to be applied, oldest first: every registration, and the newest of the rest per node
    and, of what a key must prove, per sender.

    What is left out would change nothing after what is kept; its entries are acknowledged with the batch.
    """
    every = list(events)
    kept = {
        one
        for state in fold_all(every).values()
        for one in (state.beat, state.drain, *state.http_beats, *state.byes)
        if one
    }
    kept.update(one for one in every if one.kind == "register")
    return sorted(kept, key=lambda one: (one.entry, one.epoch))
