"""Server CPU of one small job, stage by stage: submit, look, assign, finish, in batches, on a server of its own.

    .venv/bin/python -m benchmarks.protocol_cost [jobs] [batch]

CPU is the server process' own (schedstat), so other load shows only as far as it shares caches and a core's threads.
The last column names the commands that the scripts call most for, per job.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bus.cell import Cell
from bus.codec.entries import Assignment, parse_assignment
from bus.codec.events import NodeBeat
from bus.codec.wire import Assigned, Finished, FinishPiece, Owned, Pick, Submission, new_nonce
from bus.ids import GatewayId, JobId, ModelName, NodeId
from bus.jobs import ChatJob, Message
from bus.keys import REGISTRY_GROUP, WORKERS_GROUP, queue_name
from bus.link import Link, ServerAddress
from bus.settings import Settings
from tests.harness.servers import ValkeyServer

NODE = NodeId("n1")
QUEUE = queue_name("m", 1)
JOB = ChatJob(ModelName("m"), messages=(Message("user", "hello"),), max_tokens=1)
STAGES = ("submit", "look", "assign", "read", "finish")
WARM_UP = 3  # rounds


class Meter:
    """Adds up the server's CPU time and command statistics of each stage."""

    def __init__(self, link: Link, pid: int) -> None:
        self.link, self.pid = link, pid
        self.cpu_us: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.commands: dict[str, dict[str, tuple[int, int]]] = {stage: {} for stage in STAGES}

    def _now_us(self) -> float:
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1000

    async def stage(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        await self.link.send("CONFIG", "RESETSTAT")
        before = self._now_us()
        outcome = await work()
        self.cpu_us[name] += self._now_us() - before
        for line in (await self.link.send("INFO", "commandstats")).decode().splitlines():
            if line.startswith("cmdstat_"):
                command, _, figures = line.removeprefix("cmdstat_").partition(":")
                calls, usec = (int(part.partition("=")[2]) for part in figures.split(",")[:2])
                had = self.commands[name].get(command, (0, 0))
                self.commands[name][command] = (had[0] + calls, had[1] + usec)
        return outcome

    def table(self, jobs: int) -> str:
        lines = [f"{'stage':8}{'us/job':>8}  commands: calls and us per job"]
        for name in STAGES:
            top = sorted(self.commands[name].items(), key=lambda one: -one[1][1])
            words = [
                f"{c} {n / jobs:.2f}x {us / jobs:.1f}" for c, (n, us) in top if c not in ("info", "config|resetstat")
            ]
            lines.append(f"{name:8}{self.cpu_us[name] / jobs:8.1f}  {', '.join(words[:8])}")
        lines.append(f"{'total':8}{sum(self.cpu_us.values()) / jobs:8.1f}")
        return "\n".join(lines)


async def measure(jobs: int, batch: int) -> str:
    with ValkeyServer() as server:
        async with await Link.connect(ServerAddress.parse(server.url), name="cost") as link:
            cell = Cell(link, 0, Settings(lease_ms=600_000))
            owned = await ready(cell, link, batch)
            meter = Meter(link, server.pid)
            rounds = jobs // batch
            for number in range(rounds + WARM_UP):
                if number == WARM_UP:
                    meter = Meter(link, server.pid)
                await one_round(cell, link, owned, meter, [JobId(f"c0-{number:06d}{at:026d}") for at in range(batch)])
            return meter.table(rounds * batch)


async def ready(cell: Cell, link: Link, batch: int) -> Owned:
    await link.send("XGROUP", "CREATE", cell.keys.nodes, REGISTRY_GROUP, "0", "MKSTREAM")
    await link.send("XGROUP", "CREATE", cell.keys.node_jobs(NODE), WORKERS_GROUP, "0", "MKSTREAM")
    owned = await cell.own(NODE, NODE)
    assert isinstance(owned, Owned)
    beat = NodeBeat(NODE, owned.epoch, owned.holder, "echo", ("m",), capacity=batch, resume="d", decode_rate=100.0)
    await cell.apply_events([(await cell.publish_node_event(beat), beat)])
    return owned


async def one_round(cell: Cell, link: Link, owned: Owned, meter: Meter, ids: list[JobId]) -> None:
    gateway = GatewayId("gw")
    submissions = [Submission(job_id, JOB, f"gateway:{gateway}", gateway) for job_id in ids]
    await meter.stage("submit", lambda: asyncio.gather(*(cell.submit(one) for one in submissions)))
    view = await meter.stage("look", lambda: cell.look([QUEUE], heads=64))
    heads = view.queues[0].heads
    picks = [Pick(h.entry_id, h.job_id, h.fence, h.out, (NODE,), new_nonce(), b'{"n1":1}') for h in heads]
    assigned = await meter.stage("assign", lambda: cell.assign(QUEUE, picks))
    assert all(isinstance(one, Assigned) for one in assigned)
    stream = cell.keys.node_jobs(NODE)
    command = ("XREADGROUP", "GROUP", WORKERS_GROUP, owned.holder, "COUNT", 100, "STREAMS", stream, ">")
    held = to_assignments(await meter.stage("read", lambda: link.send(*command)))
    pieces = [FinishPiece(one.job_id, one.fence, one.route, 0, b"hello", "stop", 3, 1) for one in held]
    finished = await meter.stage("finish", lambda: cell.finish(owned.holder, NODE, pieces))
    assert len(finished) == len(ids) and all(isinstance(one, Finished) for one in finished)


def to_assignments(reply: Any) -> list[Assignment]:
    streams = reply.items() if isinstance(reply, dict) else reply
    return [
        parse_assignment(entry.decode(), {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)})
        for _, entries in streams
        for entry, flat in entries
    ]


if __name__ == "__main__":
    jobs, batch = (int(given) for given in [*sys.argv[1:], *("6400", "64")[len(sys.argv) - 1 :]])
    print(asyncio.run(measure(jobs, batch)))
