"""Calls on nodes and leases. One script a method; see docs/protocol.md."""

import asyncio
import logging
from collections.abc import Sequence

from bus.cell.base import CellBase, attempt_named, epoch_of, raise_if_superseded
from bus.cell.view import to_node_view
from bus.codec.events import NodeBeat, NodeEvent, NodeRegistered, event_fields
from bus.codec.node_events import apply_args, apply_script, model_keys
from bus.codec.wire import Applied, Ended, HeldBy, LockBusy, LockTaken, NodeView, Owned, Renewed, Requeued
from bus.ids import Fence, Holder, JobId, NodeId
from bus.keys import REGISTRY_GROUP
from bus.link import LinkError

log = logging.getLogger(__name__)


class NodeCalls(CellBase):
    async def own(self, node: NodeId, worker: str) -> Owned | HeldBy:
        """A worker at boot: new epoch, holder "<worker>.<epoch>" with a lease, owner of the node.

        HeldBy while another holder's lease lives, or while the id belongs to a registration over HTTP. Resets the
        node's circuit breaker: a new process, a new chance. Not alive before its first beat. What an earlier owner
        left (`left`) is handed back here: nobody else may go on with it.
        """
        keys, settings = self.keys, self.settings
        answer = await self._call(
            "own",
            [
                *(keys.node(node), keys.leases, keys.node_running(node), keys.node_alive(node), keys.events),
                keys.nodes_known,
            ],
            [node, worker, settings.lease_ms, settings.node_keep_ms],
        )
        return await self._taken(_to_owned(node, answer))

    async def adopt(self, node: NodeId, holder: Holder) -> Owned | HeldBy:
        """A relay: owner of an HTTP node under its own lease, which must live; the epoch stays the registration's.

        A holder that owns it already gets Owned again, with nothing left; what another left is handed back, as in
        `own`. HeldBy with an empty holder: no such node, or no lease.
        """
        keys = self.keys
        answer = await self._call(
            "adopt", [keys.node(node), keys.leases, keys.node_running(node), keys.events, keys.wake], [node, holder]
        )
        return await self._taken(_to_owned(node, answer))

    async def renew(self, node: NodeId, holder: Holder, jobs: Sequence[tuple[JobId, Fence]]) -> Renewed:
        """Extend the holder's lease and the listed reservations, and mark these jobs started.

        Raises Superseded if another holder owns the node. Succeeds after the lease lapsed, as long as nobody took over.
        """
        keys, settings = self.keys, self.settings
        answer = await self._call(
            "renew",
            [keys.leases, keys.node(node), keys.node_running(node), *(keys.job(job_id) for job_id, _ in jobs)],
            [
                *(holder, epoch_of(holder), settings.lease_ms, settings.node_keep_ms),
                *(word for pair in jobs for word in pair),
            ],
        )
        raise_if_superseded(node, holder, answer)
        stop = [_text(word) for word in answer[2]]
        return Renewed(
            expires_ms=int(answer[1]),
            stop=dict(zip(stop[::2], stop[1::2], strict=True)),
            cancel=tuple(map(_text, answer[3])),
            others=tuple(map(_text, answer[4])),
        )

    async def lease(self, holder: str) -> int:
        """Write the holder's lease (gateways, dispatchers, relays); answers its expiry (server ms)."""
        return int(await self._call("lease", [self.keys.leases], [holder, self.settings.lease_ms]))

    async def drop_lease(self, holder: str) -> None:
        """It is gone: lapse the lease now. The next sweep looks after a gateway's jobs."""
        await self._call("lapse", [self.keys.leases], [holder])

    async def down(self, node: NodeId | None, holder: Holder) -> list[Requeued | Ended]:
        """The holder is dead: its lease goes first, then the reservations of its node (None: of all nodes it owns)
        are requeued, each with the fence of the reservation. Nothing if another holder owns the node by now."""
        keys = self.keys
        await self.drop_lease(holder)
        nodes = [node] if node is not None else [view.node for view in await self.nodes() if view.owner == holder]
        ended: list[Requeued | Ended] = []
        for one in nodes:
            names = [keys.leases, keys.node(one), keys.node_running(one), keys.events]
            members = [_text(raw) for raw in await self._call("down", names, [one, holder])]
            work = (self._requeue(*attempt_named(member), "down", f"{holder} died") for member in members)
            for answer in await asyncio.gather(*work):
                if isinstance(answer, Requeued) or (isinstance(answer, Ended) and not answer.earlier):
                    ended.append(answer)
        return ended

    async def publish_node_event(self, event: NodeEvent) -> str:
        """XADD to `nodes`, which is trimmed by time; answers the entry id."""
        raw: bytes = await self._call(
            "publish", [self.keys.nodes], [4 * self.settings.node_ttl_ms, *event_fields(event)]
        )
        return raw.decode()

    async def apply_events(self, events: Sequence[tuple[str, NodeEvent]]) -> list[Applied]:
        """Apply entries of `nodes` (entry id, event) in order, in one pipeline; then acks and deletes them.

        A registration's outcome is answered on its `answer_to` stream (`type=reply id status detail`),
        detail = JSON {"layers": [...]}. Idempotent; order of arrival does not matter.
        """
        if not events:
            return []
        known = [self.link.send("HGET", self.keys.node(event.node), "models") for _, event in events]
        models: dict[NodeId, list[str]] = {}
        for (_, event), raw in zip(events, await asyncio.gather(*known), strict=True):
            models[event.node] = (raw or b"").decode("utf-8", "replace").split()
        calls = []
        for entry_id, event in events:
            keys = [*self._event_keys(event.node), *model_keys(self.keys, event, models[event.node])]
            if isinstance(event, NodeBeat | NodeRegistered):  # a later event of this batch finds these in the hash
                models[event.node] = list(dict.fromkeys([*models[event.node], *event.models]))
            calls.append(self._call(apply_script(event), keys, apply_args(entry_id, event, self.settings)))
        answers = await asyncio.gather(*calls)
        ids = [entry_id for entry_id, _ in events]
        await self._call("settle", [self.keys.nodes], [REGISTRY_GROUP, *ids])
        return [Applied(answer.decode()) for answer in answers]

    async def remove_node(self, node: NodeId) -> Applied:
        """Delete all keys of a node whose last beat is older than node_keep_ms. `held`: it has beaten, or still has
        reservations (the sweep requeues these first). `departed`: removed, but for the tombstone of one that left."""
        keys = self.keys
        raw = await self.link.send("HGET", keys.node(node), "models")
        models = (raw or b"").decode("utf-8", "replace").split()
        answer = await self._call(
            "remove_node",
            [
                *(keys.node(node), keys.node_alive(node), keys.node_running(node), keys.node_load(node)),
                *(keys.node_jobs(node), keys.node_control(node), keys.node_lock(node), keys.nodes_known, keys.events),
                *(key for model in models for key in (keys.model(model), keys.model_parts(model))),
            ],
            [node, self.settings.node_keep_ms],
        )
        return Applied(answer.decode())

    async def note_silent(self, node: NodeId, last_beat_ms: int) -> bool:
        """Its beats have stopped: an event `node_down`, once each time it falls silent. False: known already, or it
        has beaten meanwhile."""
        keys = self.keys
        names = [keys.node(node), keys.node_alive(node), keys.nodes_known, keys.events]
        return bool(await self._call("silent", names, [node, last_beat_ms]))

    async def nodes(self) -> list[NodeView]:
        """All known nodes, alive or not, by id. One script call."""
        answer = await self._call("nodes", [self.keys.nodes_known], [self.keys.prefix])
        return sorted((to_node_view(raw) for raw in answer[1:]), key=lambda view: view.node)

    async def node(self, node: NodeId) -> NodeView | None:
        """One known node; None if it was never heard of, has left or was removed."""
        answer = await self._call("nodes", [self.keys.nodes_known], [self.keys.prefix, node])
        return to_node_view(answer[1]) if len(answer) > 1 else None

    async def node_names(self) -> list[NodeId]:
        """Ids of all known nodes, those included that have left and whose keys the sweep has yet to remove."""
        names = await self.link.send("ZRANGE", self.keys.nodes_known, 0, -1)
        return sorted(NodeId(raw.decode("utf-8", "replace")) for raw in names)

    async def lock_node(self, node: NodeId, ttl_ms: int) -> LockTaken | LockBusy:
        """The registration lock; its fencing token is the epoch = max(stored + 1, server ms, last token + 1)."""
        answer = await self._call("lock", [self.keys.node_lock(node), self.keys.node(node)], [ttl_ms])
        return LockTaken(node, int(answer[1])) if answer[0] == b"taken" else LockBusy(node, int(answer[1]))

    async def unlock_node(self, node: NodeId, epoch: int) -> None:
        """Only the holder of this token unlocks; the token is remembered 10 s so that it is never given out again."""
        await self._call("unlock", [self.keys.node_lock(node)], [epoch])

    async def drain_node(self, node: NodeId, holder: Holder) -> None:
        """State `draining` at once (assign passes it over), without the way through the registry."""
        await self._call("drain", [self.keys.node(node)], [holder])

    async def _taken(self, answer: Owned | HeldBy) -> Owned | HeldBy:
        """Hand back what an earlier owner left. What fails here expires by itself: the node is owned all the same."""
        if isinstance(answer, Owned) and answer.left:
            why = f"left to {answer.holder}"
            work = (self._requeue(*attempt_named(member), "down", why) for member in answer.left)
            for failure in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(failure, LinkError):
                    log.warning("could not hand back", extra={"node": answer.node, "error": str(failure)})
                elif isinstance(failure, BaseException):
                    raise failure
        return answer

    async def _now(self) -> int:
        seconds, micros = await self.link.send("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def _event_keys(self, node: NodeId) -> list[str]:
        keys = self.keys
        return [keys.node(node), keys.node_alive(node), keys.nodes_known, keys.events, keys.wake]


def _to_owned(node: NodeId, answer: list[object]) -> Owned | HeldBy:
    word, *rest = answer
    if word != b"owned":
        return HeldBy(node, _text(rest[0]), _number(rest[1]))
    left = rest[2]
    assert isinstance(left, list)
    return Owned(node, _number(rest[0]), Holder(_text(rest[1])), tuple(_text(member) for member in left))


def _text(raw: object) -> str:
    assert isinstance(raw, bytes)
    return raw.decode("utf-8", "replace")  # a foreign member of a set must not stop its reader


def _number(raw: object) -> int:
    assert isinstance(raw, int | bytes)
    return int(raw)
