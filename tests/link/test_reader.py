"""The Reader: blocking reads that end in time, groups that come back, connections that heal."""

import asyncio
import time

import pytest

from bus.link import Batch, Link, LinkClosed, Reader, ServerAddress, ServerError
from tests.conftest import wait_until
from tests.harness.proxies import fault_proxy
from tests.harness.servers import ValkeyServer


async def test_a_blocked_read_gets_the_entry_when_it_is_added(address: ServerAddress, link: Link) -> None:
    async with Reader(address, name="r") as reader:
        read = asyncio.create_task(reader.xread({"s": "0"}, count=10, block_ms=5000))
        await asyncio.sleep(0.1)
        entry_id = (await link.send("XADD", "s", "*", "type", "end", "n", 1)).decode()

        assert await read == [("s", [(entry_id, {"type": b"end", "n": b"1"})])]


async def test_an_empty_read_ends_after_its_block_time(address: ServerAddress) -> None:
    async with Reader(address, name="r") as reader:
        started = time.monotonic()
        assert await reader.xread({"a": "0", "b": "0"}, count=1, block_ms=150) == []
        assert 0.1 < time.monotonic() - started < 1
        assert reader.last_reply_age_s < 1


async def test_a_missing_group_is_made_from_the_beginning(address: ServerAddress, link: Link) -> None:
    """What was added before the group existed, or after a flush, is not lost."""
    first = (await link.send("XADD", "jobs", "*", "n", 1)).decode()
    async with Reader(address, name="r") as reader:
        assert await reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=2000) == [
            ("jobs", [(first, {"n": b"1"})])
        ]

        await link.send("FLUSHALL")
        second = (await link.send("XADD", "jobs", "*", "n", 2)).decode()
        batch = await reader.xreadgroup("g", "me", {"jobs": ">", "other": ">"}, count=9, block_ms=2000)
        assert batch == [("jobs", [(second, {"n": b"2"})])]


async def test_a_group_that_vanishes_under_a_blocked_read_is_made_again(address: ServerAddress, link: Link) -> None:
    async with Reader(address, name="r") as reader:
        await reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=600)
        read = asyncio.create_task(reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=3000))
        await asyncio.sleep(0.1)
        await link.send("DEL", "jobs")
        await asyncio.sleep(0.05)
        entry = (await link.send("XADD", "jobs", "*", "n", 1)).decode()

        assert await read == [("jobs", [(entry, {"n": b"1"})])]


async def test_pending_entries_come_again_and_deleted_ones_come_empty(address: ServerAddress, link: Link) -> None:
    ids = [(await link.send("XADD", "jobs", "*", "n", n)).decode() for n in range(2)]
    async with Reader(address, name="r") as reader:
        await reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=1000)
        await link.send("XDEL", "jobs", ids[0])

        pending = await reader.xreadgroup("g", "me", {"jobs": "0"}, count=9, block_ms=1000)

        assert pending == [("jobs", [(ids[0], {}), (ids[1], {"n": b"1"})])]


async def test_a_key_of_another_type_is_an_error_not_a_loop(address: ServerAddress, link: Link) -> None:
    await link.send("SET", "s", "x")
    async with Reader(address, name="r") as reader:
        with pytest.raises(ServerError) as caught:
            await reader.xread({"s": "0"}, count=1, block_ms=100)
        assert caught.value.code == "WRONGTYPE"
        assert await reader.xread({"fine": "0"}, count=1, block_ms=50) == []


async def test_a_cancelled_read_costs_the_connection_and_the_next_read_is_in_step(
    address: ServerAddress, link: Link
) -> None:
    """A reply that is still due must not answer the next question."""
    async with Reader(address, name="r") as reader:
        read = asyncio.create_task(reader.xread({"s": "0"}, count=10, block_ms=5000))
        await asyncio.sleep(0.1)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await link.send("XADD", "s", "*", "n", 1)

        assert await reader.xread({"other": "0"}, count=10, block_ms=50) == []
        assert reader.generation == 2


async def test_another_link_can_wake_a_blocked_read(address: ServerAddress, link: Link) -> None:
    async with Reader(address, name="r") as reader:
        await reader.connect()
        assert reader.info is not None
        read = asyncio.create_task(reader.xread({"s": "0"}, count=10, block_ms=5000))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await link.send("CLIENT", "UNBLOCK", reader.info.client_id)

        assert await read == []
        assert time.monotonic() - started < 1
        assert reader.generation == 1


async def test_a_lost_reply_answers_nothing_and_the_entries_are_pending(server: ValkeyServer, link: Link) -> None:
    """XREADGROUP hands out entries even if the reply never arrives: generation tells to look at the pending ones."""
    async with fault_proxy(server.port) as proxy, Reader(ServerAddress.parse(proxy.url), name="r") as reader:
        await reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=700)
        entry = (await link.send("XADD", "jobs", "*", "n", 1)).decode()
        proxy.swallow_after(1)

        assert await reader.xreadgroup("g", "me", {"jobs": ">"}, count=9, block_ms=500) == []
        before = reader.generation
        assert await reader.xreadgroup("g", "me", {"jobs": "0"}, count=9, block_ms=500) == [
            ("jobs", [(entry, {"n": b"1"})])
        ]
        assert reader.generation == before + 1


async def test_a_read_through_a_black_hole_ends_three_seconds_after_its_block(server: ValkeyServer) -> None:
    async with (
        fault_proxy(server.port) as proxy,
        Reader(ServerAddress.parse(proxy.url), name="r", reply_grace_s=0.3) as reader,
    ):
        await reader.connect()
        proxy.drop_to_client = True
        started = time.monotonic()
        assert await reader.xread({"s": "0"}, count=1, block_ms=100) == []
        assert 0.35 < time.monotonic() - started < 2
        proxy.drop_to_client = False
        assert await reader.xread({"s": "0"}, count=1, block_ms=100) == []
        assert reader.generation == 2


async def test_while_the_server_is_away_reads_answer_nothing_at_the_pace_of_their_block(
    own_server: ValkeyServer,
) -> None:
    address = ServerAddress.parse(own_server.url)
    async with Reader(address, name="r") as reader, await Link.connect(address, name="w") as link:
        await reader.connect()
        before = reader.run_id
        own_server.kill()
        started = time.monotonic()
        rounds = 0
        while time.monotonic() - started < 1:
            assert await reader.xread({"s": "0"}, count=1, block_ms=200) == []
            rounds += 1
        assert rounds <= 8, "not a hot loop"

        own_server.start()
        entry = (await link.send("XADD", "s", "*", "n", 1)).decode()
        found: Batch = []
        async with asyncio.timeout(10):
            while not found:
                found = await reader.xread({"s": "0"}, count=1, block_ms=200)
        assert found == [("s", [(entry, {"n": b"1"})])]
        assert reader.run_id != before


async def test_a_closed_reader_ends_the_read_under_way(address: ServerAddress) -> None:
    reader = Reader(address, name="r")
    read = asyncio.create_task(reader.xread({"s": "0"}, count=1, block_ms=5000))
    await wait_until(lambda: reader.connected)
    await asyncio.sleep(0.05)
    await reader.close()
    async with asyncio.timeout(2):
        try:
            assert await read == []
        except LinkClosed:
            pass
    with pytest.raises(LinkClosed):
        await reader.xread({"s": "0"}, count=1, block_ms=10)
