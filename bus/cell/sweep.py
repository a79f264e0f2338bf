"""The sweep: everything that time does. The script names what has fallen due; each thing then has its own script,
which checks again, so a renewal or a finish that comes in between wins."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from bus.cell.base import CellBase, attempt_named
from bus.cell.follow import FollowCalls
from bus.cell.nodes import NodeCalls
from bus.codec.wire import CancelResult, Ended, NotYours, Requeued, SweepReport
from bus.ids import GatewayId, JobId, NodeId
from bus.keys import DISPATCHER_GROUP, REGISTRY_GROUP, WORKERS_GROUP
from bus.link import ServerError

T = TypeVar("T")

log = logging.getLogger(__name__)

CONSUMER_IDLE_MS = 60_000
TIDY_NODES = 4  # node streams whose consumers one sweep looks at


class SweepCalls(FollowCalls, NodeCalls, CellBase):
    async def sweep(self, holder: str, batch: int = 256) -> SweepReport:
        """Everything that time does, for one caller at a time: expired reservations (crash | unread | relay_lost),
        late jobs, deadlines, jobs of lapsed gateways by their policy, dead consumers with nothing pending, nodes past
        node_keep_ms. Reclaims nothing within the grace of one lease after a new run_id or a mass lapse."""
        keys, settings = self.keys, self.settings
        answer = await self._call(
            "sweep",
            [keys.sweep, keys.grace, keys.leases, keys.late, keys.deadlines, keys.nodes_known],
            [
                *(keys.prefix, holder, settings.lease_ms),
                *(max(1500, settings.sweep_ms * 3 // 2), batch, settings.node_keep_ms),
            ],
        )
        if answer[0] == 0:
            return SweepReport(swept=False)
        _, grace_until, expired, late, deadlines, gateways, old_nodes = answer
        requeued: list[Requeued] = []
        ended: list[Ended] = []
        reclaims = [self._reclaim(node, member) for node, member in zip(expired[::2], expired[1::2], strict=True)]
        for reply in await asyncio.gather(*reclaims):
            if isinstance(reply, Requeued):
                requeued.append(reply)
            elif isinstance(reply, Ended) and not reply.earlier:
                ended.append(reply)
        released = await asyncio.gather(*(self._due(keys.late, raw, self._release) for raw in late))
        for late_ones in await asyncio.gather(*(self._due(keys.deadlines, raw, self._expire) for raw in deadlines)):
            ended += late_ones or []
        for raw in gateways:
            ended += await self._due(keys.leases, raw, self._leave_gateway) or []
        fates = [await self._due(keys.nodes_known, raw, self._forget) for raw in old_nodes]
        await self._tidy()
        return SweepReport(
            swept=True,
            grace_until_ms=int(grace_until),
            requeued=tuple(requeued),
            ended=tuple(ended),
            released=sum(one or 0 for one in released),
            removed_nodes=tuple(node for node, status in filter(None, fates) if status in ("applied", "departed")),
            departed_nodes=tuple(node for node, status in filter(None, fates) if status == "departed"),
        )

    async def _due(self, index: str, raw: bytes, act: Callable[[str], Awaitable[T]]) -> T | None:
        """Handle one thing that has fallen due, `raw` in the set `index`. One that fails must not keep the sweep from
        the others; one that is foreign, or names a key of another type, would fail for ever: a dead letter."""
        try:
            return await act(raw.decode())
        except (ServerError, ValueError) as error:
            name = index.removeprefix(self.keys.prefix)
            fields = {"source": name, "member": repr(raw)[:80], "why": str(error)}
            if isinstance(error, ServerError) and "WRONGTYPE" not in str(error):
                log.warning("the sweep could not handle this; the next one tries again", extra=fields)
                return None
            log.error("dead letter", extra=fields)
            await self._call("cast_out", [self.keys.dead, index], [raw, str(error), self.settings.dead_keep_ms, name])
        return None

    async def _reclaim(self, raw_node: bytes, raw_member: bytes) -> Requeued | Ended | NotYours | None:
        node = NodeId(raw_node.decode("utf-8", "replace"))

        async def requeue(member: str) -> Requeued | Ended | NotYours:
            job_id, fence = attempt_named(member)
            reply = await self._requeue(job_id, fence, "expired", "its reservation expired")
            if not isinstance(reply, Requeued):
                await self._free(node, member)
            return reply

        reply = await self._due(self.keys.node_running(node), raw_member, requeue)
        if reply is None:
            await self._free(node, raw_member.decode("utf-8", "replace"))  # with its promised tokens
        return reply

    async def _free(self, node: NodeId, member: str) -> None:
        job_id, fence = attempt_named(member)
        keys = [self.keys.node_running(node), self.keys.node_load(node), self.keys.job(job_id)]
        await self._call("orphan", keys, [member, fence])

    async def _release(self, name: str) -> int:
        job_id = JobId(name)
        answer = await self._change("release", job_id, [])
        if answer[0] == b"unknown":
            await self.link.send("ZREM", self.keys.late, job_id)
        return int(answer[0] == b"released")

    async def _expire(self, name: str) -> list[Ended]:
        job_id = JobId(name)
        answer = await self._change("expire", job_id, [])
        if answer[0] == b"unknown":
            await self.link.send("ZREM", self.keys.deadlines, job_id)
        if answer[0] == b"ended" and len(answer) == 2:
            return [Ended(job_id, answer[1].decode())]
        return []

    async def _leave_gateway(self, gateway: str) -> list[Ended]:
        """Its jobs end or go on, each by its policy; a gateway that came back meanwhile keeps them all."""
        ended = []
        jobs_key = self.keys.gateway_jobs(GatewayId(gateway))
        for raw in await self.link.send("SMEMBERS", jobs_key):
            reply = await self._due(jobs_key, raw, lambda name: self._leave(JobId(name), gateway))
            if isinstance(reply, Ended) and not reply.earlier:
                ended.append(reply)
        await self._call("forget_lease", [self.keys.leases, jobs_key], [gateway])
        return ended

    async def _leave(self, job_id: JobId, gateway: str) -> CancelResult:
        return await self._cancel(job_id, "gateway_lost", gateway, lapsed=True)

    async def _forget(self, name: str) -> tuple[NodeId, str]:
        node = NodeId(name)
        return node, (await self.remove_node(node)).status

    async def _tidy(self) -> None:
        keys = self.keys
        groups = [(keys.jobs, DISPATCHER_GROUP), (keys.nodes, REGISTRY_GROUP)]
        names = await self.node_names()
        first = await self._now() // max(1, self.settings.sweep_ms) * TIDY_NODES
        groups += [
            (keys.node_jobs(names[(first + at) % len(names)]), WORKERS_GROUP)
            for at in range(min(TIDY_NODES, len(names)))
        ]
        for stream, group in groups:
            await self._call("tidy", [stream, keys.leases], [group, CONSUMER_IDLE_MS])
