"""Group reading on a real server: nothing is lost with a dead consumer, a lost reply or a flushed group."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus.link import Entry, Link, Reader, ServerAddress
from bus.link.group import GroupReader
from tests.harness.servers import ValkeyServer

STREAM, GROUP = "millrace:{c0}:nodes", "registry_consumer"
IDLE_MS = 100


@asynccontextmanager
async def consumer(address: ServerAddress, name: str) -> AsyncIterator[GroupReader]:
    async with await Link.connect(address, name=name) as link, Reader(address, name=name) as reader:
        yield GroupReader(link, reader, STREAM, GROUP, name, claim_idle_ms=IDLE_MS)


async def read_all(one: GroupReader, count: int) -> list[Entry]:
    entries: list[Entry] = []
    async with asyncio.timeout(5):
        while len(entries) < count:
            entries += await one.next_batch(100, 50)
    return entries


async def test_entries_added_before_the_group_existed_are_read(address: ServerAddress, link: Link) -> None:
    await link.send("XADD", STREAM, "*", "a", "1")

    async with consumer(address, "c1") as one:
        entries = await read_all(one, 1)
        await one.done([entry_id for entry_id, _ in entries])

    assert entries[0][1] == {"a": b"1"}
    assert await link.send("XLEN", STREAM) == 0


async def test_what_a_dead_consumer_left_is_taken_over_after_the_idle_time(address: ServerAddress, link: Link) -> None:
    for index in range(250):
        await link.send("XADD", STREAM, "*", "n", index)
    async with consumer(address, "dead") as dead:
        left = await read_all(dead, 250)  # and nothing acknowledged

    async with consumer(address, "heir") as heir:
        await heir.next_batch(1, 1)
        await asyncio.sleep(IDLE_MS / 1000 + 0.05)
        taken: list[Entry] = []
        while len(taken) < 250:
            batch = await read_all(heir, 1)
            await heir.done([entry_id for entry_id, _ in batch])
            taken += batch

    assert sorted(taken) == sorted(left)


async def test_what_could_not_be_handled_comes_again(address: ServerAddress, link: Link) -> None:
    await link.send("XADD", STREAM, "*", "a", "1")
    async with consumer(address, "c1") as one:
        first = await read_all(one, 1)
        one.failed()

        assert await one.next_batch(100, 50) == first


async def test_a_flushed_group_is_made_again(address: ServerAddress, link: Link) -> None:
    async with consumer(address, "c1") as one:
        await one.next_batch(10, 10)
        await link.send("FLUSHALL")
        await asyncio.sleep(IDLE_MS / 1000)  # so that the claim meets the missing group too
        await link.send("XADD", STREAM, "*", "a", "1")

        assert len(await read_all(one, 1)) == 1


async def test_a_pending_entry_that_was_trimmed_has_no_fields(address: ServerAddress, link: Link) -> None:
    """It can only be acknowledged, and must not be parsed."""
    await link.send("XADD", STREAM, "*", "a", "1")
    async with consumer(address, "c1") as one:
        (entry,) = await read_all(one, 1)
        await link.send("XDEL", STREAM, entry[0])
        one.failed()

        assert await one.next_batch(10, 10) == [(entry[0], {})]


async def test_a_consumer_is_removed_only_with_nothing_pending(address: ServerAddress, link: Link) -> None:
    """XGROUP DELCONSUMER drops pending work silently."""

    async def names() -> list[bytes]:
        return [flat[1] for flat in await link.send("XINFO", "CONSUMERS", STREAM, GROUP)]

    await link.send("XADD", STREAM, "*", "a", "1")
    async with consumer(address, "busy") as busy:
        entries = await read_all(busy, 1)
        await busy.leave()
        assert await names() == [b"busy"]

        await busy.done([entries[0][0]])
        await busy.leave()
        assert await names() == []


async def test_a_blocked_read_ends_when_told(address: ServerAddress) -> None:
    async with consumer(address, "c1") as one:
        await one.next_batch(10, 10)
        reading = asyncio.create_task(one.next_batch(10, 5_000))
        await asyncio.sleep(0.1)
        await one.unblock()

        assert await asyncio.wait_for(reading, 1) == []


@pytest.mark.parametrize("times", [1, 2])
async def test_entries_handed_out_with_a_lost_reply_are_found(own_server: ValkeyServer, times: int) -> None:
    """The server marks them pending when it writes the reply; a connection that dies with it must not lose them."""
    address = ServerAddress.parse(own_server.url)
    async with consumer(address, "c1") as one, await Link.connect(address, name="t") as link:
        await one.next_batch(10, 10)
        for _ in range(times):
            await link.send("XADD", STREAM, "*", "a", "1")
            # What a lost reply leaves: pending for this consumer, and the connection is gone.
            await link.send("XREADGROUP", "GROUP", GROUP, "c1", "COUNT", 10, "STREAMS", STREAM, ">")
            await link.send("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            entries = await read_all(one, 1)
            await one.done([entry_id for entry_id, _ in entries])
        assert await link.send("XPENDING", STREAM, GROUP) == [0, None, None, None]
