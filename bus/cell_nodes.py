"""Calls on nodes and leases. One method a script; see docs/protocol.md."""

from collections.abc import Sequence

from bus.cell_base import CellBase
from bus.events import NodeEvent
from bus.ids import Fence, Holder, JobId, NodeId
from bus.wire import Applied, Ended, HeldBy, LockBusy, LockTaken, NodeView, Owned, Renewed, Requeued, SweepReport


class NodeCalls(CellBase):
    async def own(self, node: NodeId, worker: str) -> Owned | HeldBy:
        """A worker at boot: new epoch, holder "<worker>.<epoch>" with a lease, owner of the node.

        HeldBy while another holder's lease lives. Resets the node's circuit breaker: a new process, a new chance.
        """
        raise NotImplementedError

    async def adopt(self, node: NodeId, holder: Holder) -> Owned | HeldBy:
        """A relay: owner of the node under its own lease, which must live; the node's epoch stays that of its registration.
        A holder that owns it already gets Owned again."""
        raise NotImplementedError

    async def renew(self, node: NodeId, holder: Holder, jobs: Sequence[tuple[JobId, Fence]]) -> Renewed:
        """Extend the holder's lease and the listed reservations, and mark these jobs started.

        Raises Superseded if another holder owns the node. Succeeds after the lease lapsed, as long as nobody took over.
        """
        raise NotImplementedError

    async def lease(self, holder: str) -> int:
        """Write the holder's lease (gateways, dispatchers, relays); answers its expiry (server ms)."""
        raise NotImplementedError

    async def drop_lease(self, holder: str) -> None:
        """It is gone: lapse the lease now. The next sweep looks after a gateway's jobs."""
        raise NotImplementedError

    async def down(self, node: NodeId | None, holder: Holder) -> list[Requeued | Ended]:
        """The holder is dead: its lease goes first, then the reservations of its node (None: of all nodes it owns)
        are requeued, each with the fence of the reservation. Nothing if another holder owns the node by now."""
        raise NotImplementedError

    async def hand_back(self, job_id: JobId, fence: Fence, entry_owner: Holder) -> Requeued | Ended | None:
        """A worker read an entry addressed to another owner: requeue it as `unread`."""
        raise NotImplementedError

    async def publish_node_event(self, event: NodeEvent) -> str:
        """XADD to `nodes`, which is trimmed by time; answers the entry id."""
        raise NotImplementedError

    async def apply_events(self, events: Sequence[tuple[str, NodeEvent]]) -> list[Applied]:
        """Apply entries of `nodes` (entry id, event) in order, one round trip; acks and deletes them.

        A registration's outcome is answered on its `answer_to` stream (`type=reply id status detail`), detail = JSON {"layers": [...]}.
        Idempotent; order of arrival does not matter.
        """
        raise NotImplementedError

    async def remove_node(self, node: NodeId) -> Applied:
        """Delete all keys of a node whose last beat is older than node_keep_ms. `held`: it has beaten, or still has
        reservations (the sweep requeues these first)."""
        raise NotImplementedError

    async def nodes(self) -> list[NodeView]:
        """All known nodes, alive or not, by id. One script call."""
        raise NotImplementedError

    async def node(self, node: NodeId) -> NodeView | None: ...

    async def node_names(self) -> list[NodeId]: ...

    async def lock_node(self, node: NodeId, ttl_ms: int) -> LockTaken | LockBusy:
        """The registration lock; its fencing token is the epoch = max(stored + 1, server ms, last token + 1)."""
        raise NotImplementedError

    async def unlock_node(self, node: NodeId, epoch: int) -> None:
        """Only the holder of this token unlocks; the token is remembered 10 s so that it is never given out again."""
        raise NotImplementedError

    async def drain_node(self, node: NodeId, holder: Holder) -> None:
        """State `draining` at once (assign passes it over), without the way through the registry."""
        raise NotImplementedError


class SweepCalls(CellBase):
    async def sweep(self, holder: str, batch: int = 256) -> SweepReport:
        """Everything that time does, for one caller at a time: expired reservations (crash | unread | relay_lost),
        late jobs, deadlines, jobs of lapsed gateways by their policy, dead consumers with nothing pending, nodes past
        node_keep_ms. Reclaims nothing within the grace of one lease after a new run_id or a mass lapse."""
        raise NotImplementedError
