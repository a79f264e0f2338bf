"""Keys: shown once, stored hashed, checked with a short cache. (HSET, HGETALL, SCAN and DEL are alike in fakeredis.)"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import fakeredis
import pytest

from bus.api_keys import CACHE_S, CACHE_UNKNOWN_S, ApiKeyError, ApiKeys, KeyLimits, hash_key
from bus.link import ServerAddress
from bus.link import client as open_client


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    client = fakeredis.FakeAsyncRedis()
    yield client
    await client.aclose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(client: Any, clock: Clock) -> ApiKeys:
    return ApiKeys(client, clock)


async def test_a_created_key_opens_what_its_scopes_say(keys: ApiKeys) -> None:
    made = await keys.create(["chat", "node"], user="ada", limits=KeyLimits(jobs_max=3))

    record = await keys.check(made.key)

    assert record == made.record
    assert record is not None
    assert record.allows("chat") and record.allows("node") and not record.allows("admin")
    assert (record.user, record.limits.jobs_max) == ("ada", 3)


async def test_an_admin_key_opens_everything(keys: ApiKeys) -> None:
    made = await keys.create(["admin"])

    assert all(made.record.allows(scope) for scope in ("chat", "node", "admin"))


async def test_the_plain_key_is_nowhere_in_the_server(keys: ApiKeys, client: Any) -> None:
    made = await keys.create(["chat"])

    stored = [(name, await client.hgetall(name)) for name in await client.keys("*")]

    assert made.key not in repr(stored)
    assert hash_key(made.key) in repr(stored)


async def test_keys_are_long_and_never_alike(keys: ApiKeys) -> None:
    made = {(await keys.create(["chat"])).key for _ in range(50)}

    assert len(made) == 50
    assert all(len(key) >= 43 for key in made)


@pytest.mark.parametrize("key", ["", "mr_wrong", "x" * 500, "mr_\n"])
async def test_any_other_key_opens_nothing(keys: ApiKeys, key: str) -> None:
    await keys.create(["chat"])

    assert await keys.check(key) is None


async def test_a_revoked_key_is_refused_once_the_cache_has_forgotten_it(keys: ApiKeys, clock: Clock) -> None:
    made = await keys.create(["chat"])
    assert await keys.check(made.key)

    assert await keys.revoke(made.record.id)

    assert await keys.check(made.key) is not None
    clock.now += CACHE_S + 0.1
    assert await keys.check(made.key) is None
    assert not await keys.revoke(made.record.id)


async def test_a_key_made_after_a_refusal_works_within_a_second(keys: ApiKeys, clock: Clock) -> None:
    """`make run` restores the local key after a FLUSHALL while clients already try."""
    assert await keys.check("mr_local") is None

    await keys.create(["chat"], key="mr_local")

    clock.now += CACHE_UNKNOWN_S + 0.1
    assert await keys.check("mr_local") is not None


async def test_restoring_a_key_twice_leaves_one(keys: ApiKeys) -> None:
    first = await keys.create(["chat"], key="mr_local", created_ms=5)
    second = await keys.create(["chat"], key="mr_local", created_ms=5)

    assert first == second
    assert await keys.list() == [first.record]


async def test_the_list_is_ordered_and_skips_foreign_hashes(keys: ApiKeys, client: Any) -> None:
    late = await keys.create(["chat"], created_ms=20)
    early = await keys.create(["node"], created_ms=10)
    await client.hset("millrace:key:foreign", mapping={"a": "b"})

    assert await keys.list() == [early.record, late.record]


@pytest.mark.parametrize("key_id", ["", "*", "0" * 15 + "*", "short", "Z" * 16])
async def test_a_strange_id_revokes_nothing(keys: ApiKeys, key_id: str) -> None:
    made = await keys.create(["chat"])

    assert not await keys.revoke(key_id)
    assert await keys.list() == [made.record]


@pytest.mark.parametrize("scopes", [[], ["root"], ["chat", "root"]])
async def test_unknown_scopes_make_no_key(keys: ApiKeys, scopes: list[str]) -> None:
    with pytest.raises(ApiKeyError):
        await keys.create(scopes)


async def test_many_different_keys_at_once_share_few_connections(address: ServerAddress) -> None:
    """The pool of an ordinary client refuses beyond its size: a busy second must not become a 503."""
    async with open_client(address, connections_max=4) as client:
        keys = ApiKeys(client)
        made = [(await keys.create(["chat"])).key for _ in range(60)]

        records = await asyncio.gather(*(keys.check(key) for key in made))

    assert all(record is not None for record in records)


async def test_a_cancelled_check_leaves_the_read_to_the_others(keys: ApiKeys) -> None:
    """A client that goes away must not break the connection that other requests wait on."""
    made = await keys.create(["chat"])
    leaving = asyncio.create_task(keys.check(made.key))
    staying = asyncio.create_task(keys.check(made.key))
    await asyncio.sleep(0)

    leaving.cancel()

    assert await staying == made.record
