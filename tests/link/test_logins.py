"""Passwords, ACL users, TLS and unix sockets on real servers; and what a role is told at its start."""

import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bus.link import Link, LinkDown, Reader, ServerAddress, ServerError, ServerUnfit, check_server, client
from tests.harness.proxies import CA_FILE, tls_proxy
from tests.harness.servers import ValkeyServer, free_port

PASSWORD = "p@ss word/#1"


@pytest.fixture(scope="module")
def locked_server() -> Iterator[ValkeyServer]:
    with ValkeyServer(password=PASSWORD) as server:
        server.call("ACL", "SETUSER", "mill", "on", ">mill:pw", "~millrace:*", "+@all", "-@dangerous", "+info")
        server.call("ACL", "SETUSER", "blind", "on", ">x", "~*", "+@all", "-info")
        yield server


async def test_a_password_opens_link_reader_and_client(locked_server: ValkeyServer) -> None:
    address = ServerAddress.parse(locked_server.url)
    async with await Link.connect(address, name="l") as link, Reader(address, name="r") as reader:
        assert await link.send("ACL", "WHOAMI") == b"default"
        assert await reader.xread({"s": "0"}, count=1, block_ms=10) == []
    async with client(address) as redis, redis.pipeline(transaction=False) as pipe:
        pipe.ping()
        pipe.exists("a")
        assert await pipe.execute() == [True, 0]


async def test_a_wrong_or_missing_password_is_an_error_at_once(locked_server: ValkeyServer) -> None:
    for login in ("", ":wrong@", "nobody:x@"):
        with pytest.raises(ServerError):
            await Link.connect(ServerAddress.parse(f"redis://{login}127.0.0.1:{locked_server.port}"), name="l")


async def test_an_acl_user_works_within_its_permissions(locked_server: ValkeyServer) -> None:
    address = ServerAddress.parse(f"redis://mill:mill%3Apw@127.0.0.1:{locked_server.port}")
    async with await Link.connect(address, name="l") as link:
        assert await link.send("ACL", "WHOAMI") == b"mill"
        assert await link.send("SET", "millrace:x", 1) == b"OK"
        with pytest.raises(ServerError) as caught:
            await link.send("SET", "other", 1)
        assert caught.value.code == "NOPERM"


async def test_tls_is_checked_against_the_given_authority(locked_server: ValkeyServer) -> None:
    async with tls_proxy(locked_server.port) as port:
        login = f"rediss://mill:mill%3Apw@localhost:{port}"
        address = ServerAddress.parse(f"{login}?ssl_ca_certs={CA_FILE}")
        async with await Link.connect(address, name="l") as link, Reader(address, name="r") as reader:
            big = b"x" * 3_000_000
            assert await link.send("SET", "millrace:big", big) == b"OK"
            assert await link.send("GET", "millrace:big") == big
            assert await reader.xread({"millrace:s": "0"}, count=1, block_ms=10) == []
        async with client(address) as redis:
            assert await redis.exists("millrace:big") == 1

        with pytest.raises(LinkDown, match="certificate"):
            await Link.connect(ServerAddress.parse(login), name="l", connect_timeout_s=0.5)
        unchecked = ServerAddress.parse(f"{login}?ssl_cert_reqs=none")
        async with await Link.connect(unchecked, name="l") as link:
            assert await link.send("PING") == b"PONG"


async def test_plain_text_to_a_tls_port_fails_cleanly(server: ValkeyServer) -> None:
    async with tls_proxy(server.port) as port:
        with pytest.raises(LinkDown):
            await Link.connect(ServerAddress.parse(f"redis://127.0.0.1:{port}"), name="l", connect_timeout_s=0.5)


def test_the_test_certificate_is_fit_for_strict_checks() -> None:
    ssl.create_default_context(cafile=str(CA_FILE))


@pytest.fixture
async def unix_address() -> AsyncIterator[ServerAddress]:
    with ValkeyServer(unix=True, password=PASSWORD) as server:
        yield ServerAddress.parse(server.url)


async def test_a_unix_socket_works_like_any_other(unix_address: ServerAddress) -> None:
    async with await Link.connect(unix_address, name="l") as link:
        assert await link.send("PING") == b"PONG"
    async with client(unix_address) as redis:
        assert await redis.ping()
    assert (await check_server(unix_address)).run_id


async def test_a_database_number_is_selected(server: ValkeyServer) -> None:
    url = f"{server.url}/3"
    async with await Link.connect(ServerAddress.parse(url), name="l") as link:
        await link.send("SET", "in3", 1)
        assert b"db3:keys=1" in await link.send("INFO", "keyspace")


async def test_a_fit_server_tells_its_version_and_run_id(server: ValkeyServer) -> None:
    info = await check_server(ServerAddress.parse(server.url))

    assert info.version >= "7.2"
    assert len(info.run_id) == 40


async def test_every_reason_to_refuse_the_start_is_one_line_that_says_what_to_do(
    locked_server: ValkeyServer, tmp_path: Path
) -> None:
    port = locked_server.port
    with ValkeyServer(options={"maxmemory-policy": "allkeys-lru"}) as evicting:
        cases = {
            evicting.url: "noeviction",
            f"redis://127.0.0.1:{port}": "correct user and password",
            f"redis://:wrong@127.0.0.1:{port}": "correct user and password",
            f"redis://blind:x@127.0.0.1:{port}": "lacks a permission",
            f"redis://127.0.0.1:{free_port()}": "start it, or correct REDIS_URL",
            f"unix://{tmp_path}/none": "start it, or correct REDIS_URL",
            "redis://no-such-host.invalid": "start it, or correct REDIS_URL",
            f"redis+sentinel://127.0.0.1:{free_port()}/mill": "no sentinel named the master",
            f"redis+cluster://127.0.0.1:{evicting.port}": "cluster",
        }
        for url, advice in cases.items():
            with pytest.raises(ServerUnfit) as caught:
                await check_server(ServerAddress.parse(url), timeout_s=2)
            assert advice in str(caught.value), url
            assert "\n" not in str(caught.value)
            assert "wrong@" not in str(caught.value)
