"""One reader for many nodes: only what they have room for, own pending first, and no wait for a blocked read."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from bus.cell import Cell
from bus.ids import Holder, NodeId
from bus.keys import WORKERS_GROUP
from bus.link import Entry, Link, ServerAddress
from bus.settings import Settings
from gpu_worker.reader import NodeReader
from tests.conftest import wait_until

HOLDER = Holder("r1.7")


class Inbox:
    """A node that says how much room it has and remembers what it was given."""

    def __init__(self, room: int) -> None:
        self.free = room
        self.gone = False
        self.jobs: list[str] = []
        self.control: list[str] = []

    def room(self) -> int:
        return self.free

    async def take_jobs(self, entries: Sequence[Entry]) -> None:
        self.free -= len(entries)
        self.jobs += [fields["job"].decode() for _, fields in entries]

    async def take_control(self, entries: Sequence[Entry]) -> None:
        self.control += [fields["type"].decode() for _, fields in entries]

    def on_gone(self) -> None:
        self.gone = True


@pytest.fixture
def cell(link: Link) -> Cell:
    return Cell(link, 0, Settings())


@pytest.fixture
async def reader(cell: Cell, address: ServerAddress) -> AsyncIterator[NodeReader]:
    """Its reads block for long, so that a test which has to wait for one fails."""
    reader = NodeReader(cell, address, HOLDER, block_ms=30_000, name="test")
    running = asyncio.create_task(reader.run())
    yield reader
    running.cancel()
    await asyncio.wait([running])


async def give(cell: Cell, node: str, *jobs: str) -> None:
    for job in jobs:
        await cell.link.send("XADD", cell.keys.node_jobs(NodeId(node)), "*", "job", job)


async def serve(reader: NodeReader, node: str, room: int) -> Inbox:
    inbox = Inbox(room)
    await reader.make_group(NodeId(node))
    reader.add(NodeId(node), inbox, since_ms=0)
    return inbox


async def test_a_node_gets_no_more_than_it_has_room_for_and_the_rest_as_soon_as_it_has(cell: Cell, reader: NodeReader):
    await give(cell, "a", "1", "2", "3")
    node = await serve(reader, "a", room=2)
    await wait_until(lambda: node.jobs == ["1", "2"])

    node.free = 1
    reader.room_came(NodeId("a"))

    await wait_until(lambda: node.jobs == ["1", "2", "3"])


async def test_a_node_that_is_added_does_not_wait_for_the_blocked_read_of_another(cell: Cell, reader: NodeReader):
    first = await serve(reader, "a", room=5)
    await give(cell, "a", "1")
    await wait_until(lambda: first.jobs == ["1"])
    await asyncio.sleep(0.1)  # the reads block again

    second = await serve(reader, "b", room=5)
    await give(cell, "b", "2")
    await cell.link.send("XADD", cell.keys.node_control(NodeId("b")), "*", "type", "drain")

    await wait_until(lambda: second.jobs == ["2"] and second.control == ["drain"])


async def test_what_was_handed_out_with_a_lost_reply_is_read_from_the_own_pending(cell: Cell, reader: NodeReader):
    await reader.make_group(NodeId("a"))
    key = cell.keys.node_jobs(NodeId("a"))
    await give(cell, "a", "1", "2")
    await cell.link.send("XREADGROUP", "GROUP", WORKERS_GROUP, HOLDER, "COUNT", 1, "STREAMS", key, ">")

    node = await serve(reader, "a", room=5)

    await wait_until(lambda: node.jobs == ["1", "2"])


async def test_a_pending_entry_that_was_deleted_is_acked_and_forgotten(cell: Cell, reader: NodeReader):
    """Its job was taken from us; a ghost in the pending list would be read at each reconnect."""
    await reader.make_group(NodeId("a"))
    key = cell.keys.node_jobs(NodeId("a"))
    await give(cell, "a", "1")
    await cell.link.send("XREADGROUP", "GROUP", WORKERS_GROUP, HOLDER, "COUNT", 1, "STREAMS", key, ">")
    await cell.link.send("XTRIM", key, "MAXLEN", 0)

    node = await serve(reader, "a", room=5)

    async def is_clean() -> bool:
        return bool((await cell.link.send("XPENDING", key, WORKERS_GROUP))[0] == 0)

    await wait_until(is_clean)
    assert node.jobs == []


async def test_a_removed_node_gets_nothing_more(cell: Cell, reader: NodeReader):
    gone, stays = await serve(reader, "a", room=5), await serve(reader, "b", room=5)
    reader.remove(NodeId("a"))
    await give(cell, "a", "1")
    await give(cell, "b", "2")

    await wait_until(lambda: stays.jobs == ["2"])
    assert gone.jobs == []


async def test_the_stream_of_a_node_that_was_removed_is_not_made_again(cell: Cell, address: ServerAddress):
    """Nobody would ever delete it. The other nodes of the read go on."""
    for name in ("a", "b"):
        await cell.link.send("HSET", cell.keys.node(NodeId(name)), "kind", "http")
    reader = NodeReader(cell, address, HOLDER, block_ms=300, name="test", forgets=True)
    running = asyncio.create_task(reader.run())
    gone, stays = await serve(reader, "a", room=5), await serve(reader, "b", room=5)
    await give(cell, "a", "1")
    await wait_until(lambda: gone.jobs == ["1"])

    await cell.link.send("DEL", cell.keys.node(NodeId("a")), cell.keys.node_jobs(NodeId("a")))
    await wait_until(lambda: gone.gone)
    await give(cell, "b", "2")
    await wait_until(lambda: stays.jobs == ["2"])
    await asyncio.sleep(0.7)

    assert not await cell.link.send("EXISTS", cell.keys.node_jobs(NodeId("a")))
    assert not stays.gone
    running.cancel()
    await asyncio.wait([running])
