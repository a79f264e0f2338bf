"""Anybody who reaches the server may XADD, ZADD and SADD: a running fleet is thrown everything, everywhere.

After each kind of nonsense the same processes still run, a neighbour is served, and the dead letters say why.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeEvent, NodeRegistered, event_fields
from bus.ids import Holder, NodeId
from bus.link import Link, ServerAddress
from tests.conftest import wait_until
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer, free_port

pytestmark = pytest.mark.slow  # a fleet for each kind of nonsense
CELL = "millrace:{c0}:"
NODE = "echo-1"
ABSURD: list[str | bytes] = [
    *("", "x", "abc", "-1", "1.5", "nan", "inf", "9" * 20, "9" * 400, "9" * 5_000, "a b", "c0-ghost", "0.0", "1.aa"),
    *("m:1", "junk", "gateway:g", "zzz", b"\xff\xfe\x00", "x" * 20_000, "[[]]", "{}"),
]
# An entry of each stream as we write it; `ours` are what makes it so. Each field is then left out, and made absurd.
FRAME = {"type": "frame", "job": "c0-ghost", "fence": "1.aa", "offset": "0", "text": "x", "count": "1"}
MARKER = {"type": "marker", "job": "c0-ghost", "fence": "1.aa", "node": "n", "text_len": "0", "token_len": "0"}
END = {
    "type": "end", "job": "c0-ghost", "fence": "1.aa", "state": "done", "reason": "stop", "text_len": "1",
    "prompt_tokens": "1", "new_tokens": "1", "node": "n", "error_code": "", "error_message": "",
    "retry_after_ms": "0", "text": "x",
}  # fmt: skip
DETACHED = {"type": "detached", "job": "c0-ghost", "by": "g"}
REPLY = {"type": "reply", "id": "i", "status": "applied", "detail": "{}"}
QUEUED = {
    "job": "c0-ghost", "fence": "1.aa", "out": "gateway:g", "est_prompt": "1", "est_new": "1",
    "deadline": "9999999999999", "alone": "", "avoided": "", "resume": "",
}  # fmt: skip
ASSIGNED = {
    "job": "c0-ghost", "fence": "1.aa", "owner": "w.1", "route": "gateway:g",
    "spec": "echo s keep 1 1 9999999999999 1 1", "text_len": "0", "token_len": "0", "payload": "",
}  # fmt: skip
WAKE = {
    "queue": "echo:1", "job": "c0-ghost", "entry": "9999999999999-1", "fence": "0.0", "out": "gateway:g",
    "est_prompt": "1", "est_new": "1", "deadline": "9999999999999",
}  # fmt: skip
CONTROL = {"type": "cancel", "job": "c0-ghost", "fence": "1.aa"}
JOB = {"job": orjson.dumps({"messages": [{"role": "user", "content": "x"}]}).decode(), "id": "ghost", "reply": "r"}
STREAMS: dict[str, list[dict[str, str]]] = {
    "queue:echo:1": [QUEUED],
    "queue:echo:0": [QUEUED],
    "wake": [WAKE],
    "jobs": [JOB],
    f"node:{NODE}:jobs": [ASSIGNED],
    f"node:{NODE}:control": [CONTROL],
    "gateway:*": [FRAME, MARKER, END, DETACHED, REPLY],
}
MEMBERS: list[str | bytes] = [
    b"\xff\xfe",
    "",
    "a b",
    "c0-ghost",
    "c0-ghost/1.aa",
    "junk",
    "dispatcher:junk",
    "x" * 5_000,
]
SCORES = ["-inf", "0", "1", "9" * 15, "+inf"]


class House:
    def __init__(self, fleet: Fleet, link: Link, http: aiohttp.ClientSession, base: str) -> None:
        self.fleet, self.link, self.http, self.base = fleet, link, http, base
        self.pids: dict[str, int] = {}

    def note_pids(self) -> None:
        self.pids = {role.name: role.child_pid() for role in self.fleet.roles}

    async def ask(self) -> None:
        """A neighbour's job is served, and every role is the process that it was."""
        body = {"prompt": "[[tokens=3]] hello", "max_new_tokens": 8}
        async with asyncio.timeout(20), self.http.post(f"{self.base}/api/chat/gpu", json=body) as response:
            answer = await response.json()
        assert response.status == 200 and answer["success"], answer
        assert {role.name: role.child_pid() for role in self.fleet.roles} == self.pids

    async def keys(self, name: str) -> list[str]:
        """The streams of this name; those of gateways carry a random word."""
        if "*" not in name:
            return [CELL + name]
        found = [raw.decode() for raw in await self.link.send("KEYS", CELL.replace("{", "\\{") + name)]
        return [key for key in found if not key.endswith(":jobs")]

    async def throw(self, name: str, fields: dict[Any, Any]) -> None:
        for key in await self.keys(name):
            flat = [word for pair in fields.items() for word in pair] or ["", ""]
            await self.link.send("XADD", key, "*", *flat)

    async def letters(self) -> list[dict[bytes, bytes]]:
        entries = await self.link.send("XRANGE", CELL + "dead", "-", "+")
        return [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries]

    async def is_quiet(self, name: str) -> bool:
        """Nothing of ours is left unread there (a trimmed or a read-only stream keeps its entries)."""
        return all([await self.link.send("XLEN", key) == 0 for key in await self.keys(name)])


@pytest.fixture
async def house(own_server: ValkeyServer, tmp_path: Path) -> AsyncIterator[House]:
    port = free_port()
    with Fleet(own_server.url, tmp_path, model="echo", capacity=8, open_rate_per_minute=0) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        fleet.start("gpu_worker", "--engine", "echo", node_id=NODE)
        fleet.start("gateway", "--port", str(port))
        address = ServerAddress.parse(own_server.url)
        async with await Link.connect(address, name="hostile") as link, aiohttp.ClientSession() as http:
            house = House(fleet, link, http, f"http://127.0.0.1:{port}")
            await wait_until(partial(link.send, "EXISTS", f"{CELL}node:{NODE}:alive"), timeout_s=20)
            await wait_until(partial(is_ready, http, house.base), timeout_s=20)
            house.note_pids()
            yield house
        for role in fleet.roles:
            assert "Traceback" not in role.log(), f"{role.name}\n{role.tail()}"


async def is_ready(http: aiohttp.ClientSession, base: str) -> bool:
    try:
        async with http.get(f"{base}/ready") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


@pytest.mark.parametrize("name", STREAMS)
async def test_no_entry_of_a_stream_stops_a_role(house: House, name: str) -> None:
    """Every field left out, and every field absurd; then one of ours beside a foreign field, and nothing at all."""
    if name == "queue:echo:0":  # that of new jobs is found by the first of them
        await house.link.send("SADD", CELL + "queues", "echo:0")
    for ours in STREAMS[name]:
        for field in ours:
            await house.throw(name, {other: value for other, value in ours.items() if other != field})
            for absurd in ABSURD:
                await house.throw(name, {**ours, field: absurd})
        await house.throw(name, {})
        await house.throw(name, {**ours, b"\xff": b"\xff", "foreign": "field"})
        await house.throw(name, {f"f{number}": "x" for number in range(500)})
    await house.ask()

    if name.startswith(("queue", "jobs")) or name.endswith(":jobs"):
        await wait_until(partial(house.is_quiet, name), timeout_s=20)
    if not name.startswith("gateway"):  # trimmed by time: foreign entries are passed over there
        await wait_until(partial(has_letters, house), timeout_s=20)
    await house.ask()
    letters = await house.letters()
    assert all(letter[b"reason"] and letter[b"source"] for letter in letters)


async def has_letters(house: House) -> bool:
    return len(await house.letters()) > 10


def node_events() -> list[NodeEvent]:
    """Well-formed, and absurd in one value."""
    beat = NodeBeat(NodeId("ghost"), 5, Holder("ghost.5"), "echo", models=("echo",), capacity=1)
    http = NodeRegistered(NodeId("ghost2"), 5, "k", "http://10.0.0.1:1", models=("echo",))
    figures = [float("nan"), float("inf"), -1.0, 1e300]
    counts = [-1, 2**53, 2**63, 10**15]
    changes: list[tuple[NodeEvent, dict[str, Any]]] = [
        *((beat, {name: value}) for name in ("prefill_rate", "decode_rate", "gpu_memory_gb") for value in figures),
        *((beat, {name: value}) for name in ("layer_count", "context_length", "free_blocks") for value in counts),
        *((beat, {"running": value}) for value in counts),
        *((beat, {name: value}) for name in ("epoch", "capacity") for value in [0, *counts]),
        *((beat, {"node": value}) for value in ("", "a b", "x" * 5_000)),
        *((beat, {"holder": value}) for value in ("", "a b", "x" * 5_000)),
        *((beat, {"models": value}) for value in ((), ("a b",), ("x" * 5_000,), ("echo",) * 1_000)),
        (beat, {"layers": (-1,)}),
        (beat, {"layers": tuple(range(5_000))}),
        (http, {"gpu_memory_gb": float("nan")}),
        *((http, {"layer_count": value, "layers": None}) for value in counts),
        (http, {"api_url": "x" * 100_000}),
        (http, {"answer_to": "nodes:known"}),
    ]
    replaced = [type(event)(**{**_values(event), **change}) for event, change in changes]
    others = [
        event(NodeId(NODE), epoch) for event in (NodeBye, NodeDrain) for epoch in (0, -1, 2**53, 2**63, 10**14 - 1)
    ]
    return [*replaced, *others, HttpBeat(NodeId("a b")), HttpBeat(NodeId("nobody"), "x" * 5_000)]


def _values(event: NodeEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}


async def test_no_news_of_nodes_stops_the_registry_or_takes_a_node_from_its_worker(house: House) -> None:
    flat = [b"1", b"\x80", b"\xff" * 50, b"\xdf" + b"\xff" * 8, b"\x91" * 2_000]
    for event in node_events():
        await house.link.send("XADD", CELL + "nodes", "*", *event_fields(event))
    for data in flat:
        for kind in ("beat", "register", "bye", "explode", ""):
            await house.link.send("XADD", CELL + "nodes", "*", "type", kind, "v", "1", "data", data)
    await house.throw("nodes", {})
    await wait_until(partial(has_letters, house), timeout_s=20)

    await house.ask()

    assert all(letter[b"reason"] for letter in await house.letters())
    epoch = int(await house.link.send("HGET", f"{CELL}node:{NODE}", "epoch"))
    assert epoch < 10**13


@pytest.mark.parametrize("name", ["late", "deadlines", "leases", "nodes:known", f"node:{NODE}:running", "queues"])
async def test_no_member_of_a_set_stops_a_role(house: House, name: str) -> None:
    for member in MEMBERS:
        word = member if isinstance(member, bytes) else member.encode()
        if name == "queues":
            await house.link.send("SADD", CELL + name, word)
            continue
        for score in SCORES:
            await house.link.send("ZADD", CELL + name, score, word + score.encode())
        await house.link.send("ZADD", CELL + name, 1, word)
    await asyncio.sleep(1.5)  # several sweeps, renewals and looks: each meets all of it

    await house.ask()

    if name == "queues":
        await wait_until(partial(has_only_queues, house), timeout_s=10)
        assert {letter[b"source"] for letter in await house.letters()} == {b"queues"}


async def has_only_queues(house: House) -> bool:
    return set(await house.link.send("SMEMBERS", CELL + "queues")) <= {b"echo:0", b"echo:1"}
