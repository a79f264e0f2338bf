"""API keys: random, shown once, kept as SHA-256 in Redis, checked with a short cache.

    millrace:key:<sha256 of the key>   hash: id, scopes, user, created_ms, jobs_max, rate_per_minute; no TTL

The plain key is never stored. 32 random bytes need no slow hash: there is nothing to guess. The id is the head of the
hash, so `list` and `revoke` need no second index. A revoked key is refused everywhere within CACHE_S.
These keys belong to no cell, so they are read with an ordinary client of the server or cluster, never on a data link.
"""

import asyncio
import contextlib
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec
from redis.exceptions import RedisError, ResponseError

from bus.keys import API_KEY_PREFIX, api_key_key
from bus.link.errors import LinkDown, to_server_error

KEY_START: Final = "mr_"
SCOPES: Final = ("chat", "node", "admin")
ID_LENGTH: Final = 16  # hex digits of the hash: 64 bits, no two keys of a fleet share them
CACHE_S: Final = 5.0
CACHE_UNKNOWN_S: Final = 1.0  # a key made right after a refusal works almost at once
CACHE_ENTRIES_MAX: Final = 10_000
READS_MAX: Final = 4  # at once; the client has at least so many connections
CHECK_WAIT_S: Final = 5.0
USER_PATTERN: Final = re.compile(r"[\x20-\x7e]{0,128}")


class ApiKeyError(ValueError):
    """The key cannot be made as asked; the message says why."""


class KeyLimits(msgspec.Struct, frozen=True):
    """0 = no limit. jobs_max: jobs of this key waiting or running at once, over all gateways."""

    jobs_max: int = 0
    rate_per_minute: int = 0


class KeyRecord(msgspec.Struct, frozen=True):
    """What is known of a key without the key."""

    id: str
    scopes: frozenset[str]
    user: str
    created_ms: int
    limits: KeyLimits = KeyLimits()

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class CreatedKey(msgspec.Struct, frozen=True):
    """`key` is seen here and never again."""

    key: str
    record: KeyRecord


class KeyClient(Protocol):
    """The commands used here, as `redis.asyncio.Redis` and `RedisCluster` offer them."""

    def hset(self, name: str, *, mapping: Mapping[str, str]) -> Awaitable[int]: ...
    def hgetall(self, name: str) -> Awaitable[dict[bytes, bytes]]: ...
    def delete(self, *names: str) -> Awaitable[int]: ...
    def scan_iter(self, match: str, count: int) -> AsyncIterator[Any]: ...


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return KEY_START + secrets.token_urlsafe(32)


def to_fields(record: KeyRecord) -> dict[str, str]:
    return {
        "id": record.id,
        "scopes": " ".join(sorted(record.scopes)),
        "user": record.user,
        "created_ms": str(record.created_ms),
        "jobs_max": str(record.limits.jobs_max),
        "rate_per_minute": str(record.limits.rate_per_minute),
    }


def parse_record(fields: Mapping[bytes, bytes]) -> KeyRecord | None:
    """None if the hash is absent or was not written by `to_fields`: such a key opens nothing."""
    try:
        return KeyRecord(
            id=fields[b"id"].decode(),
            scopes=frozenset(fields[b"scopes"].decode().split()) & frozenset(SCOPES),
            user=fields[b"user"].decode(),
            created_ms=int(fields[b"created_ms"]),
            limits=KeyLimits(int(fields.get(b"jobs_max", b"0")), int(fields.get(b"rate_per_minute", b"0"))),
        )
    except (KeyError, ValueError):
        return None


class ApiKeys:
    """Create, list, revoke and check keys. Every method may raise LinkDown or ServerError."""

    def __init__(
        self, client: KeyClient, clock: Callable[[], float] = time.monotonic, cache_s: float = CACHE_S
    ) -> None:
        self._client = client
        self._clock = clock
        self._cache_s = cache_s
        self._cache: OrderedDict[str, tuple[float, KeyRecord | None]] = OrderedDict()
        self._reads: dict[str, asyncio.Task[KeyRecord | None]] = {}
        self._places = asyncio.Semaphore(READS_MAX)

    async def create(
        self,
        scopes: Iterable[str],
        *,
        user: str = "",
        limits: KeyLimits | None = None,
        key: str | None = None,
        created_ms: int | None = None,
    ) -> CreatedKey:
        """A new key, or `key` restored after the server lost its data. Raises ApiKeyError on an unknown scope."""
        wanted = frozenset(scopes)
        if not wanted or not wanted <= frozenset(SCOPES):
            raise ApiKeyError(f"scopes must be some of {', '.join(SCOPES)}, not {', '.join(sorted(wanted)) or 'none'}")
        if USER_PATTERN.fullmatch(user) is None:
            raise ApiKeyError("the user must be at most 128 printable ASCII characters")
        key = key or new_key()
        digest = hash_key(key)
        record = KeyRecord(
            id=digest[:ID_LENGTH],
            scopes=wanted,
            user=user,
            created_ms=created_ms if created_ms is not None else int(time.time() * 1000),
            limits=limits or KeyLimits(),
        )
        with _link_errors():
            await self._client.hset(api_key_key(digest), mapping=to_fields(record))
        return CreatedKey(key, record)

    async def list(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        found = []
        with _link_errors():
            async for name in self._client.scan_iter(match=API_KEY_PREFIX + "*", count=1000):
                record = parse_record(await self._client.hgetall(_text(name)))
                if record is not None:
                    found.append(record)
        return sorted(
            {record.id: record for record in found}.values(), key=lambda record: (record.created_ms, record.id)
        )

    async def revoke(self, key_id: str) -> bool:
        """False if no key has this id."""
        if len(key_id) != ID_LENGTH or not set(key_id) <= set("0123456789abcdef"):
            return False
        revoked = False
        with _link_errors():
            async for name in self._client.scan_iter(match=f"{API_KEY_PREFIX}{key_id}*", count=1000):
                revoked = bool(await self._client.delete(_text(name))) or revoked
        return revoked

    async def check(self, key: str) -> KeyRecord | None:
        """The record of a valid key, None for any other. A cancelled caller leaves the read to the others.

        Raises LinkDown or ServerError, after CHECK_WAIT_S at the latest.
        """
        digest = hash_key(key)
        known = self._cache.get(digest)
        if known is not None and self._clock() < known[0]:
            return known[1]
        read = self._reads.get(digest)
        if read is None:
            read = asyncio.create_task(self._read(digest), name="read api key")
            self._reads[digest] = read
            read.add_done_callback(lambda done: self._forget(digest, done))
        try:
            async with asyncio.timeout(CHECK_WAIT_S):
                return await asyncio.shield(read)
        except TimeoutError:
            raise LinkDown(f"no answer within {CHECK_WAIT_S:g} s", maybe_sent=True) from None

    async def close(self) -> None:
        reads = list(self._reads.values())
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)

    def _forget(self, digest: str, done: "asyncio.Task[KeyRecord | None]") -> None:
        del self._reads[digest]
        if not done.cancelled():
            done.exception()  # its askers may all have gone away

    async def _read(self, digest: str) -> KeyRecord | None:
        with _link_errors():
            async with self._places:
                record = parse_record(await self._client.hgetall(api_key_key(digest)))
        lasts_s = min(self._cache_s, CACHE_UNKNOWN_S) if record is None else self._cache_s
        self._cache[digest] = (self._clock() + lasts_s, record)
        self._cache.move_to_end(digest)
        while len(self._cache) > CACHE_ENTRIES_MAX:
            self._cache.popitem(last=False)
        return record


@contextlib.contextmanager
def _link_errors() -> Iterator[None]:
    """redis-py's errors as the project's own: callers know no other."""
    try:
        yield
    except ResponseError as error:
        raise to_server_error(str(error)) from error
    except (RedisError, OSError) as error:
        raise LinkDown(str(error), maybe_sent=True) from error


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
