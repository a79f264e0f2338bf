"""The Link on a healthy server: order, pipelining, scripts, cancelled callers, bounds."""

import asyncio

import pytest

from bus.link import Link, LinkBusy, LinkClosed, LinkDown, Script, ServerAddress, ServerError
from tests.conftest import wait_until

APPEND = Script("append", "redis.call('RPUSH', KEYS[1], ARGV[1]) return redis.call('LLEN', KEYS[1])")
BROKEN = Script("broken", "this is no lua")
FAILING = Script("failing", "return redis.call('INCR', KEYS[1])")


async def test_replies_are_plain_values_in_the_order_of_the_commands(link: Link) -> None:
    ok, number, missing, text, many = await asyncio.gather(
        link.send("SET", "a", b"\x00\xff"),
        link.send("INCRBY", "n", 7),
        link.send("GET", "none"),
        link.send("GET", "a"),
        link.send("MGET", "a", "n", "none"),
    )

    assert (ok, number, missing, text, many) == (b"OK", 7, None, b"\x00\xff", [b"\x00\xff", b"7", None])


async def test_everything_queued_in_one_tick_leaves_in_one_write(link: Link) -> None:
    before = link.written

    await asyncio.gather(*(link.send("INCR", "n") for _ in range(500)))

    assert link.written - before == 1
    assert await link.send("GET", "n") == b"500"


async def test_an_error_reply_reaches_its_own_caller_only(link: Link) -> None:
    await link.send("SET", "text", "x")

    failed, fine = link.send("INCR", "text"), link.send("GET", "text")

    assert await fine == b"x"
    with pytest.raises(ServerError) as caught:
        await failed
    assert caught.value.code == "ERR"


async def test_a_cancelled_caller_abandons_its_reply_and_nobody_elses(link: Link) -> None:
    async def impatient() -> None:
        await link.send("INCR", "n")

    callers = [asyncio.create_task(impatient()) for _ in range(50)]
    after = asyncio.create_task(asyncio.wait_for(link.send("ECHO", "mine"), 5))
    await asyncio.sleep(0)
    for caller in callers[::2]:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)

    assert await after == b"mine"
    assert await link.send("GET", "n") == b"50"  # sent all the same: a command is not taken back
    assert link.waiting == 0


async def test_a_script_sends_its_body_once_and_then_its_digest(link: Link) -> None:
    await asyncio.gather(*(link.script(APPEND, ["l"], [i]) for i in range(20)))
    await link.script(APPEND, ["l"], [20])

    stats = (await link.send("INFO", "commandstats")).decode()
    assert "cmdstat_evalsha" in stats
    assert await link.send("LLEN", "l") == 21


async def test_scripts_flushed_in_mid_flight_run_once_each_and_in_order(link: Link) -> None:
    """The NOSCRIPT replies come back together; the bodies go out again before anything newer."""
    await link.script(APPEND, ["l"], [0])
    calls = []
    for number in range(1, 100):
        if number % 10 == 0:
            link.send("SCRIPT", "FLUSH")
        calls.append(link.script(APPEND, ["l"], [number]))
        if number % 25 == 0:
            await asyncio.sleep(0)

    assert await asyncio.gather(*calls) == list(range(2, 101))
    assert [int(item) for item in await link.send("LRANGE", "l", 0, -1)] == list(range(100))


async def test_a_script_that_does_not_compile_is_an_error_not_a_loop(link: Link) -> None:
    for _ in range(3):
        with pytest.raises(ServerError, match="compiling"):
            await link.script(BROKEN, ["k"], [])


async def test_an_error_inside_a_script_has_its_code(link: Link) -> None:
    await link.send("RPUSH", "l", "x")
    with pytest.raises(ServerError) as caught:
        await link.script(FAILING, ["l"], [])
    assert caught.value.code == "WRONGTYPE"


async def test_a_full_queue_refuses_at_once_and_takes_nothing(address: ServerAddress) -> None:
    async with await Link.connect(address, name="small", queue_max=10) as link:
        futures = [link.send("INCR", "n") for _ in range(10)]
        with pytest.raises(LinkBusy):
            link.send("INCR", "n")
        await asyncio.gather(*futures)

        assert await link.send("INCR", "n") == 11


async def test_closing_fails_what_is_outstanding_and_refuses_the_rest(address: ServerAddress) -> None:
    link = await Link.connect(address, name="closing")
    sent = link.send("BLPOP", "never", 0)
    await asyncio.sleep(0.05)
    queued = link.send("PING")
    await link.close()

    with pytest.raises(LinkDown) as caught:
        await sent
    assert caught.value.maybe_sent
    with pytest.raises((LinkClosed, LinkDown)):
        await queued
    with pytest.raises(LinkClosed):
        link.send("PING")


async def test_closing_twice_is_fine(address: ServerAddress) -> None:
    link = await Link.connect(address, name="twice")
    await link.close()
    await link.close()


async def test_a_closed_link_leaves_no_connection_behind(link: Link, address: ServerAddress) -> None:
    async with await Link.connect(address, name="short-lived"):
        assert b"short-lived" in await link.send("CLIENT", "LIST")

    async def gone() -> bool:
        return b"short-lived" not in await link.send("CLIENT", "LIST")

    await wait_until(gone)


async def test_the_first_connect_says_what_is_wrong_and_that_nothing_was_sent() -> None:
    with pytest.raises(LinkDown) as caught:
        await Link.connect(ServerAddress.parse("redis://127.0.0.1:1"), name="nobody", connect_timeout_s=0.3)
    assert not caught.value.maybe_sent
    assert "127.0.0.1:1" in str(caught.value)


async def test_large_values_pass_through_in_both_directions(link: Link) -> None:
    blob = bytes(range(256)) * 32_768  # 8 MiB

    await link.send("SET", "blob", blob)

    assert await link.send("GET", "blob") == blob


async def test_too_many_bytes_are_back_pressure_too(link: Link) -> None:
    blob = b"x" * (40 * 1024 * 1024)
    first, second = link.send("SET", "a", blob), link.send("SET", "b", blob)
    with pytest.raises(LinkBusy):
        link.send("PING")
    assert await first == await second == b"OK"
    assert await link.send("DEL", "a", "b") == 2
