"""Scripts write only keys that their caller declared, in one slot: what a cluster needs, and what ACLs can check.

The server's own MONITOR says which commands each script ran.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus.ids import GatewayId, NodeId
from bus.link import Link, ServerAddress
from tests.harness.servers import ValkeyServer
from tests.harness.topologies import Cluster
from tests.protocol.test_repeat import SCENARIOS
from tests.protocol.world import World, chat, make_world

WRITES = {
    *("hset", "hdel", "hincrby", "set", "append", "del", "pexpire", "pexpireat", "sadd", "srem", "zadd", "zrem"),
    *("zremrangebyscore", "xadd", "xdel", "xack", "xtrim", "copy", "xgroup"),
}


@asynccontextmanager
async def monitor(server: ValkeyServer) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
    writer.write(b"MONITOR\r\n")
    assert await reader.readline() == b"+OK\r\n"
    yield reader
    writer.close()
    await writer.wait_closed()


def words_of(line: str) -> list[str]:
    return re.findall(r'"((?:[^"\\]|\\.)*)"', line)


def written_keys(words: list[str]) -> list[str]:
    match words[0].lower():
        case "del":
            return words[1:]
        case "copy" | "xgroup":
            return [words[2]]
        case _:
            return [words[1]]


async def undeclared_writes(reader: asyncio.StreamReader, until: str) -> tuple[list[str], int]:
    """Commands of scripts that wrote a key not among the KEYS of their call; and how many writes were seen."""
    declared: set[str] = set()
    bad: list[str] = []
    writes = 0
    while True:
        line = (await asyncio.wait_for(reader.readline(), 10)).decode("utf-8", "replace")
        words = words_of(line)
        if not words:
            continue
        command = words[0].lower()
        if until in line:
            return bad, writes
        if command in ("eval", "evalsha"):
            declared = set(words[3 : 3 + int(words[2])])
        elif " lua]" in line and command in WRITES:
            writes += 1
            bad += [f"{command} {key}" for key in written_keys(words) if key not in declared]


async def everything_else(world: World) -> None:
    """What the scenarios leave out: large payloads, progress that moves, alone, HTTP nodes, departures, refusals."""
    await world.refused(job=chat(model="nobody"))
    await world.node("b", capacity=1)
    one = await world.start(
        "b", job=chat("x" * 9000, stream=True), tenant="t", idem_key="i", body_digest="d", address="me"
    )
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])
    for _ in range(2):
        await world.cell.requeue(one.job_id, one.fence, "crash")
        await world.dispatch("b")
        (one,) = await world.read("b")
    await world.cell.cancel(one.job_id, "me")
    await world.finish(one, 3, b"")
    relay = await world.http_node("h1")
    two = await world.start("h1")
    await world.cell.renew(NodeId("h1"), relay, [(two.job_id, two.fence)])
    await world.cell.down(None, relay)
    await world.cell.attach(two.job_id, GatewayId("g2"), "gateway:g2")
    await world.cell.drop_lease("g2")
    await world.sweep()
    await world.http_beat("h1")
    await world.link.send("ZADD", world.cell.keys.nodes_known, 1000, "h1")
    await world.sweep()
    assert await world.cell.rate("a", 1) == 0


@pytest.mark.parametrize("scenario", [*SCENARIOS, everything_else], ids=lambda one: one.__name__)
async def test_scripts_write_only_declared_keys(server: ValkeyServer, link: Link, scenario):
    async with monitor(server) as reader:
        world = await make_world(link)
        await world.node(capacity=3)
        await world.end_grace()
        await scenario(world)
        await link.send("ECHO", "the end of it")

        bad, writes = await undeclared_writes(reader, "the end of it")

    assert bad == []
    assert writes > 20


@pytest.mark.slow
@pytest.mark.parametrize("cell", range(3))
async def test_every_script_runs_in_its_cell_on_a_cluster(cluster: Cluster, cell: int):
    """Cells lie on different masters; a script that touched a key of another slot would be refused."""
    for scenario in [*SCENARIOS, everything_else]:
        address = ServerAddress.parse(cluster.url)
        async with await Link.connect(address, name="p", cell_key=f"millrace:{{c{cell}}}:jobs") as link:
            await link.send("FLUSHALL")
            world = await make_world(link, cell)
            await world.node(capacity=3)
            await world.end_grace()
            await scenario(world)
