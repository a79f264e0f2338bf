"""Sentinel and Cluster: the link and the reader follow the master and the slot's owner, and run nothing twice."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from bus.link import Link, LinkDown, Reader, Script, ServerAddress, check_server, client
from tests.conftest import wait_until
from tests.harness.topologies import Cluster, SentinelSet, running_sentinel

pytestmark = pytest.mark.slow

KEY = "{c0}:n"
OTHER = "{c0}:m"
BOTH = Script("both", "redis.call('INCR', KEYS[2]) return redis.call('INCR', KEYS[1])")
ONE = Script("one", "return redis.call('INCR', KEYS[1])")


@pytest.fixture
def sentinel_set() -> Iterator[SentinelSet]:
    with running_sentinel() as running:
        yield running


class Load:
    """Increments a counter all the time and knows how often that certainly or possibly happened."""

    def __init__(self, step: Callable[[], Awaitable[object]]) -> None:
        self._step = step
        self.done = 0
        self.unknown = 0
        self.refused = 0

    @asynccontextmanager
    async def running(self, tasks: int = 4) -> AsyncIterator["Load"]:
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                try:
                    await self._step()
                    self.done += 1
                except LinkDown as error:
                    self.unknown += error.maybe_sent
                    self.refused += not error.maybe_sent
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(work())
            try:
                yield self
            finally:
                stop.set()

    def allows(self, count: int) -> bool:
        return self.done <= count <= self.done + self.unknown


async def test_the_link_goes_to_the_owner_of_its_cells_slot(cluster: Cluster) -> None:
    address = ServerAddress.parse(cluster.url)
    for cell in range(6):
        key = f"{{c{cell}}}:x"
        async with await Link.connect(address, name="l", cell_key=key) as link:
            assert link.info is not None
            assert link.info.endpoint.port == cluster.owner(key).port
            assert await link.send("SET", key, cell) == b"OK"
    assert (await check_server(address)).fields["cluster_enabled"] == "1"


async def test_the_ordinary_client_works_on_a_cluster(cluster: Cluster) -> None:
    async with client(ServerAddress.parse(cluster.url)) as redis:
        for cell in range(6):
            await redis.set(f"{{c{cell}}}:y", cell)
        async with redis.pipeline(transaction=False) as pipe:
            for cell in range(6):
                pipe.get(f"{{c{cell}}}:y")
            assert await pipe.execute() == [b"%d" % cell for cell in range(6)]


async def test_one_dead_seed_does_not_hide_the_cluster(cluster: Cluster) -> None:
    url = cluster.url.replace("redis+cluster://", "redis+cluster://127.0.0.1:1,")
    async with await Link.connect(ServerAddress.parse(url), name="l", cell_key=KEY) as link:
        assert await link.send("EXISTS", KEY) in {0, 1}


async def test_the_link_follows_a_moved_slot_under_load_and_runs_everything_once(cluster: Cluster) -> None:
    address = ServerAddress.parse(cluster.url)
    async with await Link.connect(address, name="l", cell_key=KEY) as link:
        await link.send("DEL", KEY, OTHER)
        load = Load(lambda: link.script(BOTH, [KEY, OTHER], []))
        async with load.running():
            for _ in range(3):
                before = load.done
                await wait_until(lambda before=before: load.done > before + 20)  # type: ignore[misc]
                target = cluster.others(KEY)[0]
                await asyncio.to_thread(cluster.move, KEY, target)
            before = load.done
            await wait_until(lambda: load.done > before + 20, timeout_s=10)

        assert int(await link.send("GET", KEY)) == int(await link.send("GET", OTHER)) == load.done
        assert load.unknown == load.refused == 0, "MOVED and ASK say: not executed"
        assert link.info is not None
        assert link.info.endpoint.port == cluster.owner(KEY).port


async def test_a_slot_half_way_is_asked_at_its_new_home(cluster: Cluster) -> None:
    """ASK for a key that is not at the source any more; the link itself stays with the slot's owner."""
    address = ServerAddress.parse(cluster.url)
    key = "{c7}:half"
    source, target = cluster.owner(key), cluster.others(key)[0]
    async with await Link.connect(address, name="l", cell_key=key) as link:
        await link.send("DEL", key)
        await asyncio.to_thread(cluster.start_moving, key, target)
        try:
            calls = [link.script(ONE, [key], []) for _ in range(5)]
            assert await asyncio.gather(*calls) == [1, 2, 3, 4, 5]
            assert await link.send("INCR", key) == 6
            assert link.generation == 1
        finally:
            await asyncio.to_thread(cluster.finish_moving, key, source, target)
        assert await link.send("INCR", key) == 7
        await wait_until(lambda: link.generation == 2)


async def test_the_reader_follows_a_moved_slot(cluster: Cluster) -> None:
    address = ServerAddress.parse(cluster.url)
    stream = "{c9}:stream"
    async with (
        await Link.connect(address, name="l", cell_key=stream) as link,
        Reader(address, name="r", cell_key=stream) as reader,
    ):
        assert await reader.xreadgroup("g", "me", {stream: ">"}, count=9, block_ms=600) == []
        await asyncio.to_thread(cluster.move, stream, cluster.others(stream)[0])
        entry = (await link.send("XADD", stream, "*", "n", 1)).decode()
        found: list[str] = []
        async with asyncio.timeout(10):
            while not found:
                batch = await reader.xreadgroup("g", "me", {stream: ">"}, count=9, block_ms=300)
                found = [entry_id for _, entries in batch for entry_id, _ in entries]
        assert found == [entry]


async def test_the_master_is_asked_from_the_sentinels_and_followed_through_a_failover(
    sentinel_set: SentinelSet,
) -> None:
    address = ServerAddress.parse(sentinel_set.url)
    async with (
        await Link.connect(address, name="l", wait_s=20) as link,
        Reader(address, name="r") as reader,
        client(address) as redis,
    ):
        assert await redis.ping()
        await reader.connect()
        before = (link.run_id, reader.run_id)
        load = Load(lambda: link.send("INCR", KEY))
        async with load.running():
            await wait_until(lambda: load.done > 20)
            await asyncio.to_thread(sentinel_set.fail_over)
            await wait_until(lambda: link.generation > 1, timeout_s=20)
            now = load.done
            await wait_until(lambda: load.done > now + 20, timeout_s=20)
        await reader.xread({"s": "0"}, count=1, block_ms=200)
        await wait_until(lambda: link.connected)

        assert link.info is not None
        assert link.info.endpoint.port == sentinel_set.master().port
        assert link.run_id != before[0]
        await reader.xread({"s": "0"}, count=1, block_ms=200)
        assert reader.run_id == link.run_id
        assert int(await link.send("GET", KEY)) <= load.done + load.unknown, "nothing ran twice"


async def test_a_killed_master_is_replaced_and_waiting_commands_go_to_the_new_one(sentinel_set: SentinelSet) -> None:
    address = ServerAddress.parse(sentinel_set.url)
    async with await Link.connect(address, name="l", wait_s=30) as link:
        old = sentinel_set.master()
        old.kill()
        await wait_until(lambda: not link.connected)
        waiting = link.send("SET", "after", "x")
        await asyncio.to_thread(sentinel_set.wait_for_new_master, old)

        assert await asyncio.wait_for(waiting, 30) == b"OK"
        assert link.info is not None
        assert link.info.endpoint.port != old.port
