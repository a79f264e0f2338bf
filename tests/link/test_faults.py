"""The Link when the world breaks: what is lost is said, what is unknown is not sent twice, what waits is sent."""

import asyncio
import time

import pytest

from bus.link import Link, LinkDown, LinkError, Script, ServerAddress
from tests.conftest import wait_until
from tests.harness.proxies import FaultProxy, fault_proxy
from tests.harness.servers import ValkeyServer

COUNT = Script("count", "return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)")
COMMANDS = 12


async def outcome(future: asyncio.Future[object]) -> object:
    try:
        return await asyncio.wait_for(future, 10)
    except LinkDown as error:
        return error


async def connect(proxy: FaultProxy, *, wait_s: float = 5, reply_s: float = 5, idle_s: float = 10) -> Link:
    address = ServerAddress.parse(proxy.url)
    return await Link.connect(address, name="faulty", wait_s=wait_s, reply_s=reply_s, idle_s=idle_s)


@pytest.mark.parametrize("one_tick", [True, False], ids=["pipelined", "one by one"])
async def test_a_swallowed_reply_at_every_point_leaves_each_command_run_at_most_once(
    server: ValkeyServer, one_tick: bool
) -> None:
    """The ambiguous write: for N = 1, 2, 3 ... the Nth command runs and its reply is lost."""
    reader = await Link.connect(ServerAddress.parse(server.url), name="observer")
    async with reader, fault_proxy(server.port) as proxy:
        for nth in range(1, COMMANDS + 2):
            key = f"run{nth}"
            async with await connect(proxy) as link:
                proxy.swallow_after(nth)
                results: list[object]
                if one_tick:
                    results = await asyncio.gather(*(outcome(link.script(COUNT, [key], [i])) for i in range(COMMANDS)))
                else:
                    results = [await outcome(link.script(COUNT, [key], [i])) for i in range(COMMANDS)]

                counts = [int(n or 0) for n in await reader.send("HMGET", key, *range(COMMANDS))]
                for result, count in zip(results, counts, strict=True):
                    if isinstance(result, LinkDown):
                        assert result.maybe_sent, f"n={nth}: outcome unknown, but said to be certain"
                        assert count <= 1, f"n={nth}: ran {count} times"
                    else:
                        assert (result, count) == (1, 1), f"n={nth}"
                lost = [result for result in results if isinstance(result, LinkDown)]
                assert bool(lost) == (nth <= COMMANDS)
                if not one_tick and lost:
                    assert len(lost) == 1, "later commands wait for the next connection"
        assert proxy.swallowed.is_set() is False or nth > COMMANDS


async def test_a_reset_fails_the_written_and_sends_the_waiting_on_the_next_connection(server: ValkeyServer) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy) as link:
        proxy.drop_to_client = True
        written = link.send("INCR", "written")
        await wait_until(lambda: proxy.commands >= 4)
        proxy.drop_to_client = False
        proxy.reset()
        await wait_until(lambda: not link.connected)
        waiting = link.send("INCR", "waiting")

        result = await outcome(written)
        assert isinstance(result, LinkDown)
        assert result.maybe_sent
        assert await waiting == 1
        assert link.generation == 2


async def test_a_command_waits_only_so_long_for_a_connection_and_then_certainly_did_not_run(
    server: ValkeyServer,
) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy, wait_s=0.3) as link:
        proxy.refuse = True
        proxy.reset()
        await wait_until(lambda: not link.connected)
        started = time.monotonic()
        result = await outcome(link.send("INCR", "n"))

        assert isinstance(result, LinkDown)
        assert not result.maybe_sent
        assert 0.25 < time.monotonic() - started < 2
        proxy.refuse = False
        await link.wait_connected(5)
        assert await link.send("INCR", "n") == 1


@pytest.mark.parametrize("direction", ["drop_to_server", "drop_to_client"])
async def test_a_black_hole_in_either_direction_is_found_by_the_missing_reply(
    server: ValkeyServer, direction: str
) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy, reply_s=0.5) as link:
        setattr(proxy, direction, True)
        result = await outcome(link.send("INCR", "n"))
        setattr(proxy, direction, False)

        assert isinstance(result, LinkDown)
        assert result.maybe_sent, "from here it cannot be told whether it ran"
        await link.wait_connected(5)
        assert await link.send("INCR", "n") == (1 if direction == "drop_to_server" else 2)


async def test_a_slow_network_only_takes_longer(server: ValkeyServer) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy) as link:
        proxy.latency_s = 0.05
        started = time.monotonic()
        assert await asyncio.gather(*(link.send("INCR", "n") for _ in range(100))) == list(range(1, 101))
        assert time.monotonic() - started < 1, "one round trip for all, not a hundred"


async def test_after_kill_9_the_link_comes_back_with_another_run_id(own_server: ValkeyServer) -> None:
    async with await Link.connect(ServerAddress.parse(own_server.url), name="survivor") as link:
        seen: list[tuple[int, bool]] = []
        link.on_reconnect(lambda: seen.append((link.generation, link.connected)))
        before = link.run_id
        await link.send("SET", "kept", "x")
        await link.script(COUNT, ["h"], ["f"])
        await asyncio.sleep(1.2)  # AOF everysec: what is older than a second survives

        own_server.kill()
        await wait_until(lambda: not link.connected)
        text, number = link.send("GET", "kept"), link.script(COUNT, ["h"], ["f"])
        own_server.start()

        assert (await text, await number) == (
            b"x",
            2,
        )  # the script's body was sent again: the new server has never seen it
        assert link.run_id != before
        assert seen == [(2, True)]


async def test_a_callback_at_reconnect_may_send_and_a_broken_one_harms_nobody(server: ValkeyServer) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy) as link:
        answers: list[asyncio.Future[object]] = []
        link.on_reconnect(lambda: 1 // 0)  # type: ignore[arg-type]
        link.on_reconnect(lambda: answers.append(link.send("ECHO", "again")))
        proxy.reset()
        await wait_until(lambda: link.generation == 2 and bool(answers))
        assert await answers[0] == b"again"


async def test_a_frozen_server_is_given_up_and_found_again(own_server: ValkeyServer) -> None:
    address = ServerAddress.parse(own_server.url)
    async with await Link.connect(address, name="patient", reply_s=0.5, connect_timeout_s=1.0) as link:
        own_server.pause()
        result = await outcome(link.send("INCR", "n"))
        own_server.resume()

        assert isinstance(result, LinkDown)
        assert result.maybe_sent
        await link.wait_connected(5)
        assert int(await link.send("INCR", "n")) in {1, 2}, "the link itself sends nothing twice"


async def test_an_idle_link_notices_a_dead_connection(server: ValkeyServer) -> None:
    async with fault_proxy(server.port) as proxy, await connect(proxy, reply_s=0.3, idle_s=0.2) as link:
        proxy.drop_to_server = True
        await wait_until(lambda: not link.connected, timeout_s=5)
        proxy.drop_to_server = False
        await link.wait_connected(5)


async def test_chaos_never_runs_a_command_twice_nor_loses_an_answer(server: ValkeyServer) -> None:
    """Resets at random moments under load: every future ends, what was acknowledged is there, once."""
    async with fault_proxy(server.port) as proxy, await connect(proxy) as link:
        results: dict[int, object] = {}

        async def worker(first: int) -> None:
            for i in range(first, first + 40):
                results[i] = await outcome(link.script(COUNT, ["h"], [i]))

        async def breaker() -> None:
            for _ in range(15):
                await asyncio.sleep(0.03)
                proxy.reset()

        async with asyncio.TaskGroup() as group:
            for start in range(0, 800, 40):
                group.create_task(worker(start))
            group.create_task(breaker())
    async with await Link.connect(ServerAddress.parse(server.url), name="observer") as observer:
        counts = [int(n or 0) for n in await observer.send("HMGET", "h", *range(800))]

    assert len(results) == 800
    assert max(counts) <= 1
    for i, result in results.items():
        if isinstance(result, LinkDown):
            assert result.maybe_sent or counts[i] == 0
        else:
            assert (result, counts[i]) == (1, 1)


async def test_every_error_of_the_link_has_one_base() -> None:
    assert issubclass(LinkDown, LinkError)
