"""The registry on a real server: the order of news, several consumers, foreign entries, a flushed server."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus.cell import Cell
from bus.codec.entries import Answer, parse_out
from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeEvent, NodeRegistered, event_fields
from bus.ids import Holder, NodeId
from bus.keys import REGISTRY_GROUP
from bus.link import Link
from bus.process.child import ParentLine
from bus.settings import Settings
from registry_consumer.service import run
from tests.conftest import wait_until
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer

TTL_MS = 3_000


@pytest.fixture
def settings(server: ValkeyServer) -> Settings:
    return Settings().changed(
        redis_url=server.url, node_ttl_ms=TTL_MS, beat_ms=500, block_ms=100, claim_idle_ms=200, node_keep_ms=60_000
    )


@pytest.fixture
def cell(link: Link, settings: Settings) -> Cell:
    return Cell(link, 0, settings)


@asynccontextmanager
async def registry(settings: Settings) -> AsyncIterator[None]:
    """One registry consumer in this process, stopped in good order."""
    parent = ParentLine()
    async with asyncio.TaskGroup() as group:
        group.create_task(run(settings, parent))
        yield
        parent.stop.set()


def beat(node: str, epoch: int, **fields: object) -> NodeBeat:
    known = {"kind": "echo", "models": ("m",), "capacity": 4, "holder": Holder(f"{node}.{epoch}"), **fields}
    return NodeBeat(node=NodeId(node), epoch=epoch, **known)  # type: ignore[arg-type]


def registered(node: str, epoch: int, **fields: object) -> NodeRegistered:
    known = {"key_id": "k1", "api_url": "http://10.0.0.1:1", "models": ("m",), **fields}
    return NodeRegistered(node=NodeId(node), epoch=epoch, **known)  # type: ignore[arg-type]


async def server_ms(link: Link) -> int:
    seconds, micros = await link.send("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def add(cell: Cell, event: NodeEvent, at_ms: int | None = None, seq: int = 0) -> str:
    """XADD the event, as if it had been added at at_ms (not before the stream's newest entry)."""
    entry_id = "*" if at_ms is None else f"{at_ms}-{seq}"
    added: bytes = await cell.link.send("XADD", cell.keys.nodes, entry_id, *event_fields(event))
    return added.decode()


def drained(cell: Cell) -> Callable[[], Awaitable[bool]]:
    async def nothing_left() -> bool:
        if await cell.link.send("XLEN", cell.keys.nodes):
            return False
        if not await cell.link.send("EXISTS", cell.keys.nodes):
            return True
        groups = await cell.link.send("XINFO", "GROUPS", cell.keys.nodes)
        pending = [await cell.link.send("XPENDING", cell.keys.nodes, group[1]) for group in groups]
        return all(one[0] == 0 for one in pending)

    return nothing_left


async def is_alive(cell: Cell, node: str) -> bool:
    view = await cell.node(NodeId(node))
    return view is not None and view.alive


async def dead_reasons(cell: Cell) -> list[str]:
    entries = await cell.link.send("XRANGE", cell.keys.dead, "-", "+")
    return [dict(zip(flat[::2], flat[1::2], strict=True))[b"reason"].decode() for _, flat in entries]


async def answers(cell: Cell, out: str) -> list[Answer]:
    found = []
    for _, flat in await cell.link.send("XRANGE", cell.keys.out(out), "-", "+"):
        entry = parse_out({name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)})
        assert isinstance(entry, Answer)
        found.append(entry)
    return found


async def test_a_worker_is_known_and_alive_from_its_first_beat(cell: Cell, settings: Settings) -> None:
    async with registry(settings):
        await cell.publish_node_event(beat("w", 5, capacity=7))
        await wait_until(lambda: is_alive(cell, "w"))

    view = await cell.node(NodeId("w"))
    assert view is not None
    assert (view.capacity, view.epoch, view.models) == (7, 5, ("m",))


async def test_a_registration_is_answered_on_the_asking_gateways_stream(cell: Cell, settings: Settings) -> None:
    """Every gateway may show the node from the moment of the answer."""
    async with registry(settings):
        event = registered("h", 5, layers=(0, 1, 2, 3), answer_to="gateway:g1", answer_id="r-1")
        await cell.publish_node_event(event)
        await wait_until(lambda: cell.link.send("EXISTS", cell.keys.out("gateway:g1")))

        (answer,) = await answers(cell, "gateway:g1")
        view = await cell.node(NodeId("h"))

    assert (answer.id, answer.status) == ("r-1", "applied")
    assert view is not None and view.layers == (0, 1, 2, 3)


async def test_registrations_that_omit_layers_are_given_the_least_covered_ranges(
    cell: Cell, settings: Settings
) -> None:
    """Also those that arrive in one batch, and one that registers again keeps what it had."""
    for name in ("a", "b"):
        await add(cell, registered(name, 5, gpu_memory_gb=24.0, answer_to="gateway:g1", answer_id=name))
    async with registry(settings):
        await wait_until(drained(cell))
        await add(cell, registered("a", 6, gpu_memory_gb=24.0, answer_to="gateway:g1", answer_id="again"))
        await wait_until(drained(cell))

    details = {answer.id: json.loads(answer.detail)["layers"] for answer in await answers(cell, "gateway:g1")}
    assert details == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7], "again": [0, 1, 2, 3]}


async def test_a_backlog_of_old_beats_revives_no_dead_node_and_loses_no_live_one(
    cell: Cell, settings: Settings
) -> None:
    """The TTL counts from the entry id: read late, old beats are still old."""
    now = await server_ms(cell.link)
    for index in range(300):
        await add(cell, beat("gone", 5), now - 60_000, index)
    await add(cell, beat("fresh", 5))

    async with registry(settings):
        await wait_until(drained(cell))

    assert await is_alive(cell, "fresh")
    assert not await is_alive(cell, "gone")


async def test_news_of_an_older_epoch_and_what_follows_a_bye_change_nothing(cell: Cell, settings: Settings) -> None:
    async with registry(settings):
        await add(cell, beat("n", 6, capacity=6))
        await add(cell, beat("left", 5))
        await wait_until(drained(cell))
        await add(cell, beat("n", 5, capacity=5))
        await add(cell, NodeDrain(NodeId("n"), 5))
        await add(cell, NodeBye(NodeId("left"), 5))
        await wait_until(drained(cell))
        await add(cell, beat("left", 5))
        await wait_until(drained(cell))

    view = await cell.node(NodeId("n"))
    assert view is not None and (view.capacity, view.epoch, view.state) == (6, 6, "up")
    assert not await is_alive(cell, "left")


async def test_an_http_beat_keeps_a_known_node_alive_and_creates_none(cell: Cell, settings: Settings) -> None:
    async with registry(settings):
        await add(cell, registered("h", 5, layers=()))
        await wait_until(drained(cell))
        before = await cell.node(NodeId("h"))
        await asyncio.sleep(0.02)
        await add(cell, HttpBeat(NodeId("h"), "k1"))
        await add(cell, HttpBeat(NodeId("nobody"), "k1"))
        await wait_until(drained(cell))
        after = await cell.node(NodeId("h"))

    assert before is not None and after is not None and after.last_beat_ms > before.last_beat_ms
    assert await cell.node(NodeId("nobody")) is None


FOREIGN: list[list[str | bytes]] = [
    ["hello", "world"],
    ["type", "beat", "v", "1", "node", "n", "epoch", "1"],
    ["type", "beat", "v", "99", "node", "n", "epoch", "1", "data", b"\x80"],
    ["type", "coup", "v", "1", "node", "n", "epoch", "1", "data", b"\x80"],
    ["type", "beat", "v", "1", "node", "n", "epoch", "1", "data", b"\xff\x00garbage"],
    ["type", "drain", "v", "1", "node", "n", "epoch", "1", "data", event_fields(beat("n", 1))[-1]],
    event_fields(beat("bad id!", 1)),
    event_fields(beat("n", 1, models=())),
    event_fields(beat("n", 1, capacity=0)),
    event_fields(beat("n", -5)),
    event_fields(NodeBye(NodeId("x" * 65), 1)),
    event_fields(NodeBye(NodeId("n"), 2**63)),
    event_fields(NodeBye(NodeId("n"), 10**14 - 1)),
    event_fields(NodeDrain(NodeId("n"), -1)),
    event_fields(beat("n", 2**53 - 1)),
    event_fields(beat("n", 1, prefill_rate=float("nan"))),
    event_fields(beat("n", 1, decode_rate=float("inf"))),
    event_fields(beat("n", 1, decode_rate=-1.0)),
    event_fields(beat("n", 1, total_blocks=2**63)),
    event_fields(beat("n", 1, holder=Holder("two words"))),
    event_fields(beat("n", 1, resume="two words")),
    event_fields(registered("n", 1, gpu_memory_gb=float("nan"))),
    event_fields(registered("n", 1, gpu_memory_gb=float("inf"))),
    event_fields(registered("n", 1, layer_count=10**15)),
    event_fields(registered("n", 1, layer_count=-1)),
    event_fields(registered("n", 1, context_length=2**63)),
    event_fields(registered("n", 1, answer_to="gateway: g1")),
    event_fields(registered("n", 1, api_url="http://" + "x" * 4_000)),
    [b"\xff\xfe", b"\xff", "v", "1"],
]


async def test_foreign_entries_become_dead_letters_with_a_reason_and_their_neighbours_live(
    cell: Cell, settings: Settings
) -> None:
    await add(cell, beat("first", 5))
    for fields in FOREIGN:
        await cell.link.send("XADD", cell.keys.nodes, "*", *fields)
    await add(cell, beat("last", 5))

    async with registry(settings):
        await wait_until(drained(cell))

    assert await is_alive(cell, "first") and await is_alive(cell, "last")
    reasons = await dead_reasons(cell)
    assert len(reasons) == len(FOREIGN)
    assert all(reasons)


async def test_a_foreign_keys_beat_in_the_same_batch_does_not_take_the_owners_place(
    cell: Cell, settings: Settings
) -> None:
    async with registry(settings):
        await add(cell, registered("h", 5, layers=()))
        await wait_until(drained(cell))
    before = await cell.node(NodeId("h"))
    await asyncio.sleep(0.02)
    await add(cell, HttpBeat(NodeId("h"), "k1"))
    await add(cell, HttpBeat(NodeId("h"), "somebody's"))

    async with registry(settings):
        await wait_until(drained(cell))

    after = await cell.node(NodeId("h"))
    assert before is not None and after is not None and after.last_beat_ms > before.last_beat_ms


async def test_foreign_members_of_the_known_nodes_are_put_away(cell: Cell, settings: Settings) -> None:
    """Anybody may ZADD: names that are no node's, times that are none."""
    known = cell.keys.nodes_known
    await cell.link.send("ZADD", known, 1, b"\xff\xfe", "-inf", "a b", 1, "x" * 500, "-inf", "ghost", "+inf", "late")
    async with registry(settings):
        await cell.publish_node_event(beat("w", 5))
        await wait_until(lambda: is_alive(cell, "w"))

        async def gone() -> bool:
            return set(await cell.link.send("ZRANGE", known, 0, -1)) == {b"w", b"late"}

        await wait_until(gone)

    assert await dead_reasons(cell) == ["no node's id"] * 3


async def test_a_foreign_key_in_a_nodes_place_costs_only_that_node(cell: Cell, settings: Settings) -> None:
    await cell.link.send("SET", cell.keys.node(NodeId("taken")), "not a hash")
    for name in ("a", "taken", "b"):
        await add(cell, beat(name, 5))

    async with registry(settings):
        await wait_until(drained(cell))

    assert await is_alive(cell, "a") and await is_alive(cell, "b")
    (reason,) = await dead_reasons(cell)
    assert reason


async def test_after_a_flush_a_worker_is_whole_again_with_its_next_beat(cell: Cell, settings: Settings) -> None:
    async with registry(settings):
        await cell.publish_node_event(beat("w", 5, capacity=7))
        await wait_until(lambda: is_alive(cell, "w"))
        await cell.link.send("FLUSHALL")
        await cell.publish_node_event(beat("w", 5, capacity=7))
        await wait_until(lambda: is_alive(cell, "w"))

    view = await cell.node(NodeId("w"))
    assert view is not None and view.capacity == 7


async def test_a_node_without_beats_for_long_is_forgotten_whole(cell: Cell, settings: Settings) -> None:
    short = settings.changed(node_ttl_ms=900, beat_ms=50, node_keep_ms=1_200)
    async with registry(short):
        await cell.publish_node_event(beat("w", 5))
        await wait_until(lambda: is_alive(cell, "w"))

        async def forgotten() -> bool:
            return await cell.node(NodeId("w")) is None

        await wait_until(forgotten)

    keys = [key.decode() for key in await cell.link.send("KEYS", "*")]
    assert [key for key in keys if "node:w" in key] == []


async def events_of(cell: Cell, node: str) -> list[str]:
    entries = await cell.link.send("XRANGE", cell.keys.events, "-", "+")
    found = [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries]
    return [one[b"type"].decode() for one in found if one[b"subject"] == node.encode()]


async def test_a_node_that_falls_silent_is_said_to_be_down_once_and_up_when_it_beats_again(
    cell: Cell, settings: Settings
) -> None:
    """Whoever of several consumers notices; a node that is silent stays registered."""
    short = settings.changed(node_ttl_ms=900, beat_ms=50)
    async with registry(short), registry(short):
        for down in (1, 2):
            await cell.publish_node_event(beat("w", 5))
            await wait_until(lambda: is_alive(cell, "w"))
            await wait_until(lambda: _downs(cell, "w", down))  # noqa: B023
        await asyncio.sleep(0.4)

    assert await events_of(cell, "w") == ["node_up", "node_down", "node_up", "node_down"]
    assert await cell.node(NodeId("w")) is not None


async def _downs(cell: Cell, node: str, count: int) -> bool:
    return (await events_of(cell, node)).count("node_down") == count


async def test_every_cell_has_its_own_registry(settings: Settings, link: Link) -> None:
    three = settings.changed(cells=3)
    last = Cell(link, 2, three)
    async with registry(three):
        await last.publish_node_event(beat("w", 5))
        await wait_until(lambda: is_alive(last, "w"))


async def test_three_consumers_one_killed_in_the_middle_of_a_backlog_of_5000_beats(
    cell: Cell, settings: Settings, tmp_path: Path
) -> None:
    """What the dead consumer held is taken over; every live node is alive, every dead one dead, nothing pending."""
    now = await server_ms(cell.link)
    nodes = [f"n{index}" for index in range(50)]
    calls = []
    for index in range(4_950):
        name = nodes[index % 50] if index % 2 else f"old{index % 70}"
        calls.append(add(cell, beat(name, 5, running=index), now - 60_000, index))
    await asyncio.gather(*calls)
    for name in nodes:
        await add(cell, beat(name, 5, capacity=9))

    with Fleet(settings.redis_url, tmp_path, claim_idle_ms=300, node_ttl_ms=20_000, block_ms=200) as fleet:
        consumers = [fleet.start("registry_consumer") for _ in range(3)]
        victim = consumers[1]
        victim.child_pid()
        await wait_until(lambda: cell.link.send("EXISTS", cell.keys.nodes_known), timeout_s=15, step_s=0.002)
        victim.kill()
        await wait_until(drained(cell), timeout_s=15)
        views = {view.node: view for view in await cell.nodes()}

    assert all(views[NodeId(name)].alive and views[NodeId(name)].capacity == 9 for name in nodes)
    assert not any(view.alive for name, view in views.items() if name.startswith("old"))
    groups = await cell.link.send("XINFO", "GROUPS", cell.keys.nodes)
    assert groups[0][1] == REGISTRY_GROUP.encode()
    assert not await dead_reasons(cell)


async def test_a_stopped_consumer_leaves_nothing_behind(cell: Cell, settings: Settings) -> None:
    async with registry(settings):
        await cell.publish_node_event(beat("w", 5))
        await wait_until(lambda: is_alive(cell, "w"))

    assert await cell.link.send("XINFO", "CONSUMERS", cell.keys.nodes, REGISTRY_GROUP) == []
