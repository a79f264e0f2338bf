"""Which HTTP nodes this relay takes, leaves or serves anew. Pure: what the server shows -> a plan.

Relays share the nodes without talking to each other: each node has one relay by rendezvous over the relays that have
a lease, which takes it at once; any other takes it when it has been without an owner for PATIENCE_S. A wrong guess is
harmless, `adopt` checks. A node that is served stays where it is until its relay is gone.
"""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from bus.codec.wire import NodeView
from bus.ids import Holder, NodeId, rendezvous
from gpu_worker.relay_engine.engine import RelayNode

HOLDER_PREFIX = "relay:"  # of a relay's name among the leases
PATIENCE_S = 2.0


class Serving(msgspec.Struct, frozen=True):
    """A node that this relay serves, as it was when it was taken."""

    node: RelayNode
    draining: bool = False  # on an order


class WatchPlan(msgspec.Struct, frozen=True):
    take: tuple[RelayNode, ...] = ()
    leave: tuple[NodeId, ...] = ()  # gone, or to be served anew with what its last registration says


def to_relay_node(view: NodeView) -> RelayNode:
    return RelayNode(view.node, view.api_url, view.models, max(1, view.capacity), view.layers)


def relays_of(leases: Iterable[str], me: Holder) -> list[str]:
    """Relays that live, by the holders of leases; `me` always counts."""
    return sorted({me, *(one for one in leases if one.startswith(HOLDER_PREFIX))})


class Unowned:
    """Since when each node has been seen without a living owner."""

    def __init__(self) -> None:
        self._since: dict[NodeId, float] = {}

    def see(self, views: Collection[NodeView], now_s: float) -> Mapping[NodeId, float]:
        """Seconds without an owner, for those that have none."""
        free = [view.node for view in views if view.kind == "http" and not view.leased]
        self._since = {node: self._since.get(node, now_s) for node in free}
        return {node: now_s - since for node, since in self._since.items()}


def plan_watch(
    me: Holder,
    relays: list[str],
    views: Collection[NodeView],
    served: Mapping[NodeId, Serving],
    free_s: Mapping[NodeId, float],
) -> WatchPlan:
    """Nodes to take now, and served ones to leave. A node that is left is taken again at a later look."""
    known = {view.node: view for view in views if view.kind == "http" and view.state != "bye"}
    leave = [node for node, serving in served.items() if not _stands(serving, known.get(node))]
    take = [
        to_relay_node(view)
        for view in known.values()
        if view.node not in served
        and view.alive
        and (not view.leased or view.owner == me)
        and (view.owner == me or rendezvous(view.node, relays)[0] == me or free_s.get(view.node, 0.0) >= PATIENCE_S)
    ]
    return WatchPlan(tuple(take), tuple(leave))


def _stands(serving: Serving, view: NodeView | None) -> bool:
    """Whether the node is still the one that is served. A drained node that registered again is served anew."""
    if view is None:
        return False
    again = serving.draining and view.state == "up"
    return not again and msgspec.structs.replace(to_relay_node(view), layers=serving.node.layers) == serving.node
