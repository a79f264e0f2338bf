"""What must be true of a cell after every single step, read from the server alone."""

import asyncio
from collections import Counter
from collections.abc import Iterable

from bus.codec.entries import End, parse_out, parse_queued
from bus.codec.wire import TERMINAL_STATES
from bus.ids import JobId
from tests.protocol.world import World

MAY_LACK_TTL = (
    *("usage:", "jobs", "queue:", "wake", "nodes", "events", "dead", "queues", "nodes:known", "leases", "late"),
    *("deadlines",),
)


def may_lack_ttl(name: str) -> bool:
    """The listed few of design 3.2, by the key's name without the cell's prefix."""
    if name.startswith("node:"):
        return name.endswith((":jobs", ":running"))
    return any(name == one or (one.endswith(":") and name.startswith(one)) for one in MAY_LACK_TTL)


def pairs(flat: list[bytes]) -> dict[str, bytes]:
    return {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}


async def check_invariants(world: World, jobs: Iterable[JobId], texts: dict[JobId, bytes]) -> None:
    """jobs: all ever submitted. texts: the whole answer that every attempt at a job produces."""
    keys, send = world.cell.keys, world.link.send
    found = await asyncio.gather(*(world.cell.job(job) for job in jobs))
    records = {record.job_id: record for record in found if record is not None}
    live = {job for job, record in records.items() if record.state not in TERMINAL_STATES}

    # Exactly one terminal for an ended job, none for a living one, on whatever out-streams it has been.
    ends: Counter[JobId] = Counter()
    for out in ("gateway:g1", "gateway:g2"):
        for _, flat in await send("XRANGE", keys.out(out), "-", "+"):
            entry = parse_out(pairs(flat))
            if isinstance(entry, End):
                ends[entry.job_id] += 1
                assert entry.state == records[entry.job_id].state
    for job, record in records.items():
        assert ends[job] == (job not in live), (job, record, ends[job])

    # Load is the reservations: one for each job that runs on the node, never above capacity; companions go with them.
    running_anywhere = 0
    for node in await world.cell.node_names():
        expected = {f"{job}/{r.fence}": r for job, r in records.items() if r.state == "running" and r.node == node}
        members = {raw.decode() for raw in await send("ZRANGE", keys.node_running(node), 0, -1)}
        assert members == set(expected), node
        assert {raw.decode() for raw in await send("HKEYS", keys.node_load(node))} == members
        capacity = int(await send("HGET", keys.node(node), "capacity") or 0)
        assert len(members) <= capacity
        running_anywhere += len(members)

        # Nothing in the node's stream, pending or not, but what runs there.
        entries = await send("XRANGE", keys.node_jobs(node), "-", "+")
        held = {f"{pairs(flat)['job'].decode()}/{pairs(flat)['fence'].decode()}" for _, flat in entries}
        assert held == members and len(entries) == len(members)
        pending = await send("XPENDING", keys.node_jobs(node), "workers", "-", "+", 100)
        assert {one[0] for one in pending} <= {raw for raw, _ in entries}
    assert running_anywhere == sum(record.state == "running" for record in records.values())

    # A waiting job is in its queue exactly once, or held back; nothing else is in the queues.
    late = {raw.decode() for raw in await send("ZRANGE", keys.late, 0, -1)}
    places: Counter[str] = Counter()
    for queue in ("m:0", "m:1"):
        for raw, flat in await send("XRANGE", keys.prefix + "queue:" + queue, "-", "+"):
            head = parse_queued(raw.decode(), pairs(flat))
            places[head.job_id] += 1
            assert head.fence == records[head.job_id].fence
    assert {job for job in live if records[job].state == "queued"} == {JobId(job) for job in places} | late
    assert all(count == 1 for count in places.values()) and not late & set(places)

    # Indexes name living jobs, each where it belongs.
    assert {raw.decode() for raw in await send("ZRANGE", keys.deadlines, 0, -1)} == live
    assert {raw.decode() for raw in await send("ZRANGE", keys.quota("k"), 0, -1)} == {
        job for job in live if records[job].route.key_id
    }
    for gateway in ("g1", "g2"):
        listed = {raw.decode() for raw in await send("SMEMBERS", keys.gateway_jobs(gateway))}  # type: ignore[arg-type]
        assert listed <= {job for job in live if records[job].route.gateway == gateway}

    # The stored text is always a beginning of the one answer, and a finished job has all of it.
    stored = await asyncio.gather(*(world.cell.text(job, record.fence) for job, record in records.items()))
    for (job, record), text in zip(records.items(), stored, strict=True):
        assert texts[job].startswith(text)
        if record.state == "done":
            assert text == texts[job]

    names = await send("KEYS", "*")
    for raw, ttl in zip(names, await asyncio.gather(*(send("PTTL", raw) for raw in names)), strict=True):
        name = raw.decode().removeprefix(keys.prefix)
        assert may_lack_ttl(name) or ttl != -1, f"{name} has no TTL"
