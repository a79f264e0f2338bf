"""The sweep: everything that time does. The script names what has fallen due; each thing then has its own script,
which checks again, so a renewal or a finish that comes in between wins."""

import asyncio

from bus.cell.base import CellBase
from bus.cell.follow import FollowCalls
from bus.cell.nodes import NodeCalls
from bus.codec.wire import Ended, NotYours, Requeued, SweepReport
from bus.ids import Fence, GatewayId, JobId, NodeId
from bus.keys import DISPATCHER_GROUP, REGISTRY_GROUP, WORKERS_GROUP

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
        members = [raw.decode() for raw in expired]
        reclaims = [self._reclaim(NodeId(node), one) for node, one in zip(members[::2], members[1::2], strict=True)]
        for reply in await asyncio.gather(*reclaims):
            if isinstance(reply, Requeued):
                requeued.append(reply)
            elif isinstance(reply, Ended) and not reply.earlier:
                ended.append(reply)
        released = sum(await asyncio.gather(*(self._release(JobId(raw.decode())) for raw in late)))
        for late_ones in await asyncio.gather(*(self._expire(JobId(raw.decode())) for raw in deadlines)):
            ended += late_ones
        for raw in gateways:
            ended += await self._leave_gateway(raw.decode())
        removed = [node for node in (NodeId(raw.decode()) for raw in old_nodes) if await self._forget(node)]
        await self._tidy()
        return SweepReport(
            swept=True,
            grace_until_ms=int(grace_until),
            requeued=tuple(requeued),
            ended=tuple(ended),
            released=released,
            removed_nodes=tuple(removed),
        )

    async def _reclaim(self, node: NodeId, member: str) -> Requeued | Ended | NotYours:
        job_id, fence = JobId(member.partition("/")[0]), Fence(member.partition("/")[2])
        reply = await self._requeue(job_id, fence, "expired", "its reservation expired")
        if not isinstance(reply, Requeued):
            keys = [self.keys.node_running(node), self.keys.node_load(node), self.keys.job(job_id)]
            await self._call("orphan", keys, [member, fence])
        return reply

    async def _release(self, job_id: JobId) -> int:
        answer = await self._change("release", job_id, [])
        if answer[0] == b"unknown":
            await self.link.send("ZREM", self.keys.late, job_id)
        return int(answer[0] == b"released")

    async def _expire(self, job_id: JobId) -> list[Ended]:
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
            reply = await self._cancel(JobId(raw.decode()), "gateway_lost", gateway, lapsed=True)
            if isinstance(reply, Ended) and not reply.earlier:
                ended.append(reply)
        await self._call("forget_lease", [self.keys.leases, jobs_key], [gateway])
        return ended

    async def _forget(self, node: NodeId) -> bool:
        return (await self.remove_node(node)).status == "applied"

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
