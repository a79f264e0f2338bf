"""A cell with nodes, gateways and jobs for tests of the scripts: real server, real calls, time moved by hand.

Nothing here waits: `age` moves the stored times of leases, reservations, hold-backs and deadlines into the past.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.cell import Cell
from bus.codec.entries import Assignment, End, Frame, Marker, OutEntry, parse_assignment, parse_out
from bus.codec.events import HttpBeat, NodeBeat, NodeEvent, NodeRegistered
from bus.codec.wire import (
    Accepted,
    Assigned,
    FinishPiece,
    FinishReply,
    FlushPiece,
    FlushReply,
    NotAssigned,
    Owned,
    Pick,
    Refused,
    Submission,
    new_nonce,
    pack_tokens,
)
from bus.ids import GatewayId, Holder, JobId, ModelName, NodeId
from bus.jobs import ChatJob, Message
from bus.keys import REGISTRY_GROUP, WORKERS_GROUP, QueueName
from bus.link import Link, ServerError
from bus.settings import Settings

MODEL = ModelName("m")
GATEWAY = GatewayId("g1")
SETTINGS = Settings()


def chat(text: str = "hello", *, stream: bool = False, model: str = MODEL) -> ChatJob:
    return ChatJob(ModelName(model), messages=(Message("user", text),), max_tokens=8, stream=stream)


@dataclass
class World:
    cell: Cell
    link: Link
    holders: dict[NodeId, Holder] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    # --- nodes ---

    async def node(
        self, name: str = "n1", *, capacity: int = 2, resume: str = "d", models: Sequence[str] = (MODEL,), **more: Any
    ) -> Holder:
        """A torch-like node, owned, alive and leased."""
        node = NodeId(name)
        owned = await self.cell.own(node, name)
        assert isinstance(owned, Owned), owned
        self.holders[node] = owned.holder
        await self.group(self.cell.keys.node_jobs(node), WORKERS_GROUP)
        await self.beat(name, capacity=capacity, resume=resume, models=models, **more)
        return owned.holder

    async def beat(
        self, name: str, *, capacity: int = 2, resume: str = "d", models: Sequence[str] = (MODEL,), **more: Any
    ) -> str:
        node = NodeId(name)
        holder = self.holders[node]
        epoch = int(holder.rpartition(".")[2])
        beat = NodeBeat(node, epoch, holder, "echo", models=tuple(models), capacity=capacity, resume=resume, **more)
        return await self.publish(beat)

    async def http_node(self, name: str = "h1", *, relay: str = "relay.1", key_id: str = "k1") -> Holder:
        """A node registered over HTTP, served by a relay."""
        node = NodeId(name)
        lock = await self.cell.lock_node(node, 1000)
        event = NodeRegistered(node, lock.epoch, key_id, "http://n/", models=(MODEL,), capacity=2)  # type: ignore[union-attr]
        await self.publish(event)
        await self.cell.unlock_node(node, event.epoch)
        holder = Holder(relay)
        await self.cell.lease(holder)
        owned = await self.cell.adopt(node, holder)
        assert isinstance(owned, Owned), owned
        self.holders[node] = holder
        await self.group(self.cell.keys.node_jobs(node), WORKERS_GROUP)
        return holder

    async def publish(self, event: NodeEvent) -> str:
        """Publish and apply; answers the status."""
        entry = await self.cell.publish_node_event(event)
        return (await self.cell.apply_events([(entry, event)]))[0].status

    async def http_beat(self, name: str, key_id: str = "k1") -> str:
        return await self.publish(HttpBeat(NodeId(name), key_id))

    # --- jobs ---

    def submission(self, name: str | None = None, **more: Any) -> Submission:
        job_id = JobId(f"c{self.cell.cell}-{name or f'job{next(self.numbers)}'}")
        stream = more.pop("stream", False)
        more.setdefault("job", chat(stream=stream))
        gateway = more.setdefault("gateway", GATEWAY)
        more.setdefault("out", f"gateway:{gateway}")
        return Submission(job_id=job_id, **more)

    async def submit(self, name: str | None = None, **more: Any) -> JobId:
        answer = await self.cell.submit(self.submission(name, **more))
        assert isinstance(answer, Accepted), answer
        return answer.job_id

    async def refused(self, name: str | None = None, **more: Any) -> Refused:
        answer = await self.cell.submit(self.submission(name, **more))
        assert isinstance(answer, Refused), answer
        return answer

    async def dispatch(self, *nodes: str, queue: QueueName | None = None) -> list[Assigned | NotAssigned]:
        """Look, then assign every head to the first of `nodes` (default: all, by name) that can take it."""
        view = await self.cell.look([queue] if queue else ())
        names = tuple(NodeId(node) for node in nodes) or tuple(sorted(view.nodes))
        replies: list[Assigned | NotAssigned] = []
        for one in sorted(view.queues, key=lambda q: q.queue.rpartition(":")[2]):
            picks = [Pick(h.entry_id, h.job_id, h.fence, h.out, names, new_nonce(), b'{"wait":1}') for h in one.heads]
            replies += await self.cell.assign(one.queue, picks)
        return replies

    async def read(self, node: str) -> list[Assignment]:
        """New entries of the node's stream, as its owner reads them."""
        key, holder = self.cell.keys.node_jobs(NodeId(node)), self.holders[NodeId(node)]
        reply = await self.link.send("XREADGROUP", "GROUP", WORKERS_GROUP, holder, "COUNT", 100, "STREAMS", key, ">")
        return [parse_assignment(entry, fields) for entry, fields in _entries(reply)]

    async def start(self, node: str = "n1", name: str | None = None, **more: Any) -> Assignment:
        """Submit a job and have the node read it."""
        job_id = await self.submit(name, **more)
        await self.dispatch(node)
        found = [one for one in await self.read(node) if one.job_id == job_id]
        assert found, "the job was not assigned"
        return found[0]

    async def flush(
        self, one: Assignment, offset: int, text: bytes, token_offset: int = 0, tokens: Sequence[int] = ()
    ) -> FlushReply:
        piece = FlushPiece(one.job_id, one.fence, one.route, offset, text, token_offset, pack_tokens(tokens))
        return (await self.cell.flush(one.owner, node_of(one, self), [piece]))[0]

    async def finish(self, one: Assignment, offset: int = 0, text: bytes = b"hi", **more: Any) -> FinishReply:
        more.setdefault("reason", "stop")
        piece = FinishPiece(one.job_id, one.fence, one.route, offset, text, **more)
        return (await self.cell.finish(one.owner, node_of(one, self), [piece]))[0]

    # --- what others see ---

    async def out(self, out: str = f"gateway:{GATEWAY}") -> list[OutEntry]:
        entries = await self.link.send("XRANGE", self.cell.keys.out(out), "-", "+")
        return [parse_out(_pairs(pairs)) for _, pairs in entries]

    async def ends(self, job_id: JobId | None = None, out: str = f"gateway:{GATEWAY}") -> list[End]:
        return [one for one in await self.out(out) if isinstance(one, End) and job_id in (None, one.job_id)]

    async def frames(self, out: str = f"gateway:{GATEWAY}") -> list[Frame]:
        return [one for one in await self.out(out) if isinstance(one, Frame)]

    async def markers(self, out: str = f"gateway:{GATEWAY}") -> list[Marker]:
        return [one for one in await self.out(out) if isinstance(one, Marker)]

    async def state(self, job_id: JobId) -> str:
        record = await self.cell.job(job_id)
        return record.state if record else "unknown"

    async def running(self, node: str = "n1") -> list[str]:
        raw = await self.link.send("ZRANGE", self.cell.keys.node_running(NodeId(node)), 0, -1)
        return [member.decode() for member in raw]

    async def pending(self, node: str = "n1") -> int:
        """Entries of the node's stream, delivered or not."""
        return int(await self.link.send("XLEN", self.cell.keys.node_jobs(NodeId(node))))

    async def dead(self) -> list[dict[str, bytes]]:
        return [_pairs(pairs) for _, pairs in await self.link.send("XRANGE", self.cell.keys.dead, "-", "+")]

    async def dump(self) -> dict[bytes, bytes]:
        """Every key's serialised value: to prove that nothing changed, or to bring an older state back."""
        keys = sorted(await self.link.send("KEYS", "*"))
        return {key: await self.link.send("DUMP", key) for key in keys}

    async def restore(self, dump: dict[bytes, bytes]) -> None:
        """The server as it was: what a restart makes of a log that lost its last second."""
        await self.link.send("FLUSHALL")
        for key, value in dump.items():
            await self.link.send("RESTORE", key, 0, value)

    # --- time ---

    async def age_zset(self, key: str, member: str | None = None) -> None:
        for raw in await self.link.send("ZRANGE", key, 0, -1):
            if member is None or raw.decode() == member:
                await self.link.send("ZADD", key, 1000, raw)

    async def age_reservations(self, node: str = "n1", member: str | None = None) -> None:
        await self.age_zset(self.cell.keys.node_running(NodeId(node)), member)

    async def age_lease(self, holder: str) -> None:
        await self.age_zset(self.cell.keys.leases, holder)

    async def age_late(self) -> None:
        await self.age_zset(self.cell.keys.late)

    async def age_deadline(self, job_id: JobId) -> None:
        await self.age_zset(self.cell.keys.deadlines, job_id)
        key = self.cell.keys.job(job_id)
        words = (await self.link.send("HGET", key, "spec")).decode().split(" ")
        words[5] = "1000"
        await self.link.send("HSET", key, "spec", " ".join(words))

    async def end_grace(self) -> None:
        """Arm the grace of a new server, then let it pass."""
        await self.cell.sweep("sweeper")
        await self.link.send("SET", self.cell.keys.grace, f"{self.link.run_id} 0 0", "PX", 60_000)

    async def sweep(self) -> Any:
        await self.link.send("DEL", self.cell.keys.sweep)
        return await self.cell.sweep("sweeper")

    async def group(self, stream: str, group: str) -> None:
        try:
            await self.link.send("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")
        except ServerError as error:
            if error.code != "BUSYGROUP":
                raise


async def make_world(link: Link, cell: int = 0, settings: Settings = SETTINGS) -> World:
    world = World(Cell(link, cell, settings), link)
    await world.group(world.cell.keys.nodes, REGISTRY_GROUP)
    await world.cell.lease(GATEWAY)
    return world


def node_of(one: Assignment, world: World) -> NodeId:
    return next(node for node, holder in world.holders.items() if holder == one.owner)


def _pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}


def _entries(reply: Any) -> list[tuple[str, dict[str, bytes]]]:
    streams = reply.items() if isinstance(reply, dict) else (reply or [])
    return [(entry.decode(), _pairs(pairs)) for _, entries in streams for entry, pairs in entries]
