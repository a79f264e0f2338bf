"""Where fakeredis may stand in for a server, and where it may not: one suite on both.

Every case runs on the real server and on fakeredis. Those marked `real_only` are known to differ: on fakeredis they
must fail (strict), so this file is the list, and an update of fakeredis that changes it is noticed.

The conclusion for this project: API keys, hashes, sorted sets and plain stream appends may be tested on fakeredis;
groups in trouble, a failing network and every Lua script, and so the whole protocol, need the real server.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import fakeredis
import pytest
from redis import exceptions

from bus.link import ServerAddress, client
from tests.harness.servers import ValkeyServer


@pytest.fixture(params=["real", "fake"])
async def redis(request: pytest.FixtureRequest, session_server: ValkeyServer) -> AsyncIterator[Any]:
    if request.param == "fake":
        if differs := request.node.get_closest_marker("real_only"):
            request.applymarker(pytest.mark.xfail(strict=True, reason=differs.args[0]))
        async with fakeredis.FakeAsyncRedis(version=(7, 2), protocol=2) as fake:
            yield fake
    else:
        server: ValkeyServer = request.getfixturevalue("server")
        async with client(ServerAddress.parse(server.url)) as real:
            yield real


# --- agree ----------------------------------------------------------------------------------------------------------


async def test_set_nx_with_expiry_takes_a_key_once(redis: Any) -> None:
    assert await redis.set("k", "a", nx=True, px=5000)
    assert await redis.set("k", "b", nx=True, px=5000) is None
    assert await redis.get("k") == b"a"
    assert 0 < await redis.pttl("k") <= 5000


async def test_hashes_keep_bytes_and_count_new_fields(redis: Any) -> None:
    assert await redis.hset("h", mapping={"a": b"\x00\xff", "b": 1}) == 2
    assert await redis.hset("h", "a", "x") == 0
    assert await redis.hgetall("h") == {b"a": b"x", b"b": b"1"}
    assert await redis.hmget("h", "a", "none") == [b"x", None]
    assert await redis.hincrby("h", "b", 4) == 5


async def test_sorted_sets_order_by_score_then_name_and_cut_by_score(redis: Any) -> None:
    await redis.zadd("z", {"b": 2, "a": 2, "c": 1})
    assert await redis.zrange("z", 0, -1) == [b"c", b"a", b"b"]
    assert await redis.zrangebyscore("z", "-inf", 1) == [b"c"]
    assert await redis.zadd("z", {"c": 0}, gt=True) == 0
    assert await redis.zscore("z", "c") == 1
    assert await redis.zremrangebyscore("z", "-inf", "(2") == 1
    assert await redis.zcard("z") == 2


async def test_expired_keys_are_gone(redis: Any) -> None:
    await redis.set("k", 1, px=30)
    await asyncio.sleep(0.06)
    assert await redis.exists("k") == 0
    assert await redis.pttl("k") == -2


async def test_a_key_of_another_type_is_wrongtype(redis: Any) -> None:
    await redis.set("k", 1)
    for call in (redis.hget("k", "f"), redis.zcard("k"), redis.xadd("k", {"a": 1}), redis.sadd("k", 1)):
        with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
            await call


async def test_text_is_appended_and_cut_by_bytes(redis: Any) -> None:
    assert await redis.append("t", "mül") == 4
    assert await redis.append("t", "l") == 5
    assert await redis.getrange("t", 2, -1) == b"\xbcll"
    assert await redis.strlen("t") == 5


async def test_appended_entries_come_back_in_order_with_their_fields(redis: Any) -> None:
    ids = [await redis.xadd("s", {"n": n, "raw": b"\xff"}) for n in range(3)]
    assert await redis.xrange("s") == [(entry, {b"n": b"%d" % n, b"raw": b"\xff"}) for n, entry in enumerate(ids)]
    assert await redis.xrange("s", min=b"(" + ids[0], count=1) == [(ids[1], {b"n": b"1", b"raw": b"\xff"})]
    assert await redis.xlen("s") == 3


async def test_a_deleted_entry_is_gone_and_ids_never_go_back(redis: Any) -> None:
    last = await redis.xadd("s", {"n": 1}, id="9999999999999-5")
    assert await redis.xdel("s", last) == 1
    assert await redis.xlen("s") == 0
    with pytest.raises(exceptions.ResponseError, match="equal or smaller"):
        await redis.xadd("s", {"n": 2}, id="9999999999999-5")


async def test_an_append_to_a_missing_stream_can_be_declined(redis: Any) -> None:
    assert await redis.xadd("s", {"n": 1}, nomkstream=True) is None
    assert await redis.exists("s") == 0


async def test_trimming_by_time_drops_what_is_older(redis: Any) -> None:
    for ms in (100, 200, 300):
        await redis.xadd("s", {"n": ms}, id=f"{ms}-0")
    await redis.xtrim("s", minid="200-0", approximate=False)
    assert [entry for entry, _ in await redis.xrange("s")] == [b"200-0", b"300-0"]


async def test_a_group_hands_each_entry_to_one_consumer_and_ack_forgets_it(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    for n in range(3):
        await redis.xadd("s", {"n": n})
    [[_, first]] = await redis.xreadgroup("g", "a", {"s": ">"}, count=2)
    [[_, second]] = await redis.xreadgroup("g", "b", {"s": ">"}, count=2)
    assert [len(first), len(second)] == [2, 1]
    assert (await redis.xpending("s", "g"))["pending"] == 3
    assert await redis.xack("s", "g", first[0][0]) == 1
    assert await redis.xack("s", "g", first[0][0]) == 0
    assert (await redis.xpending("s", "g"))["pending"] == 2


async def test_a_group_made_twice_is_busygroup_and_a_missing_one_nogroup(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    with pytest.raises(exceptions.ResponseError, match="BUSYGROUP"):
        await redis.xgroup_create("s", "g", id="0", mkstream=True)
    with pytest.raises(exceptions.ResponseError, match="NOGROUP"):
        await redis.xreadgroup("other", "a", {"s": ">"})


async def test_a_pipeline_answers_each_command_and_keeps_errors_apart(redis: Any) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        pipe.set("k", 1)
        pipe.hget("k", "f")
        pipe.incr("k")
        ok, wrong, number = await pipe.execute(raise_on_error=False)
    assert (ok, number) == (True, 2)
    assert isinstance(wrong, exceptions.ResponseError)


async def test_scanning_finds_every_key_of_a_pattern(redis: Any) -> None:
    for n in range(50):
        await redis.set(f"millrace:key:{n}", n)
    await redis.set("other", 1)
    assert len([key async for key in redis.scan_iter(match="millrace:key:*")]) == 50


async def test_approximate_trimming_keeps_whole_nodes(redis: Any) -> None:
    for n in range(220):
        await redis.xadd("s", {"n": n}, maxlen=50, approximate=True)
    assert await redis.xlen("s") == 120


async def test_own_pending_entries_are_read_again_from_zero(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    first, second = [await redis.xadd("s", {"n": n}) for n in range(2)]
    await redis.xreadgroup("g", "a", {"s": ">"}, count=1)
    await redis.xreadgroup("g", "b", {"s": ">"}, count=1)
    [[_, mine]] = await redis.xreadgroup("g", "a", {"s": "0"})
    assert [entry for entry, _ in mine] == [first]
    [[_, theirs]] = await redis.xreadgroup("g", "b", {"s": "0"})
    assert [entry for entry, _ in theirs] == [second]


async def test_a_deleted_pending_entry_is_read_without_fields(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    entry = await redis.xadd("s", {"n": 1})
    await redis.xreadgroup("g", "a", {"s": ">"})
    await redis.xdel("s", entry)
    assert (await redis.execute_command("XREADGROUP", "GROUP", "g", "a", "STREAMS", "s", "0")) == [
        [b"s", [(entry, {})]]
    ]


async def test_a_blocked_read_is_woken_by_an_append(redis: Any) -> None:
    read = asyncio.create_task(redis.xread({"s": "0"}, block=3000, count=10))
    await asyncio.sleep(0.1)
    entry = await redis.xadd("s", {"n": 1})
    assert await asyncio.wait_for(read, 2) == [[b"s", [(entry, {b"n": b"1"})]]]


async def test_idle_entries_of_another_consumer_are_claimed(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    entry = await redis.xadd("s", {"n": 1})
    await redis.xreadgroup("g", "a", {"s": ">"})
    await asyncio.sleep(0.03)
    assert (await redis.xautoclaim("s", "g", "b", min_idle_time=10_000))[1] == []
    assert (await redis.xautoclaim("s", "g", "b", min_idle_time=10))[1] == [(entry, {b"n": b"1"})]
    assert [one["name"] for one in await redis.xinfo_consumers("s", "g") if one["pending"]] == [b"b"]


async def test_deleting_a_consumer_drops_its_pending_entries(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    await redis.xadd("s", {"n": 1})
    await redis.xreadgroup("g", "a", {"s": ">"})
    assert await redis.xgroup_delconsumer("s", "g", "a") == 1
    assert (await redis.xpending("s", "g"))["pending"] == 0


async def test_a_claim_that_wants_ids_only_does_not_count_as_a_delivery(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    entry = await redis.xadd("s", {"n": 1})
    await redis.xreadgroup("g", "a", {"s": ">"})
    assert await redis.xclaim("s", "g", "b", 0, [entry], justid=True) == [entry]
    assert (await redis.xpending_range("s", "g", "-", "+", 10))[0]["times_delivered"] == 1


async def test_a_transaction_is_aborted_when_a_watched_key_changed(redis: Any) -> None:
    async with redis.pipeline() as pipe:
        await pipe.watch("k")
        await redis.set("k", 1)
        pipe.multi()
        pipe.set("k", 2)
        with pytest.raises(exceptions.WatchError):
            await pipe.execute()
    assert await redis.get("k") == b"1"


async def test_entries_read_by_xinfo_stream(redis: Any) -> None:
    last = await redis.xadd("s", {"n": 1})
    info = await redis.xinfo_stream("s")
    assert (info["length"], info["last-generated-id"], info["groups"]) == (1, last, 0)


# --- differ: on the real server only --------------------------------------------------------------------------------


@pytest.mark.real_only("no Lua without the lupa package, and another Lua with it")
async def test_scripts_are_loaded_by_their_digest(redis: Any) -> None:
    with pytest.raises(exceptions.NoScriptError):
        await redis.evalsha("0" * 40, 0)
    assert await redis.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "k", "v") == b"OK"


@pytest.mark.real_only("INFO has no run_id, no role and no maxmemory policy")
async def test_info_says_who_answers(redis: Any) -> None:
    info = await redis.info()
    assert len(info["run_id"]) == 40
    assert (info["role"], info["maxmemory_policy"]) == ("master", "noeviction")


@pytest.mark.real_only("goes on waiting for a stream that is gone, where a server answers NOGROUP")
async def test_a_blocked_group_read_hears_that_its_stream_was_deleted(redis: Any) -> None:
    await redis.xgroup_create("s", "g", id="0", mkstream=True)
    read = asyncio.create_task(redis.xreadgroup("g", "a", {"s": ">"}, block=1500, count=10))
    await asyncio.sleep(0.1)
    await redis.delete("s")
    with pytest.raises(exceptions.ResponseError):
        await read


@pytest.mark.real_only("no WAIT")
async def test_wait_asks_replicas(redis: Any) -> None:
    assert await redis.wait(0, 10) == 0
