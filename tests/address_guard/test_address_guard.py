"""A node's owner chooses the URL that we call: it must not lead into our own network."""

import ipaddress
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer

from bus.address_guard import (
    AddressPolicy,
    AddressRefused,
    AllowError,
    as_address,
    check_answers,
    guarded_session,
    is_never,
    open_socket,
    parse_target,
)

PUBLIC = AddressPolicy.parse("")
ANY = AddressPolicy.parse("*")


def permits(policy: AddressPolicy, address: str, host: str = "") -> bool:
    return policy.refusal(ipaddress.ip_address(address), host) is None


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_pass_by_default(address: str) -> None:
    assert permits(PUBLIC, address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "0.0.0.0"),
        *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("192.88.99.1", "::1", "::", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "100::1", "4000::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::a00:1"),
        *(
            "2002:7f00:1::",
            "2002:c0a8:101::1",
            "2001:0:7f00:1::",
            "2606:4700::5efe:10.0.0.1",
            "2606:4700::200:5efe:a00:1",
        ),
    ],
)
def test_addresses_that_are_not_public_are_refused_by_default_in_every_disguise(address: str) -> None:
    assert not permits(PUBLIC, address)


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "169.254.170.2", "fe80::1", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"),
        *("192.0.0.192", "fd20:ce::254", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"),
        *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"),
    ],
)
@pytest.mark.parametrize("allow", ["*", "0.0.0.0/0,::/0", "evil.test", "169.254.0.0/16,fe80::/10"])
def test_link_local_and_metadata_addresses_are_never_called_whatever_the_setting_says(address: str, allow: str) -> None:
    assert not permits(AddressPolicy.parse(allow), address, "evil.test")


def test_a_star_permits_private_networks() -> None:
    assert permits(ANY, "10.0.0.1") and permits(ANY, "127.0.0.1") and permits(ANY, "::1")


def test_a_list_says_all_of_what_is_allowed() -> None:
    policy = AddressPolicy.parse(" 10.0.0.0/8 , 2001:db8::/32, 192.168.1.7 ")

    assert permits(policy, "10.1.2.3") and permits(policy, "2001:db8::5") and permits(policy, "192.168.1.7")
    assert permits(policy, "::ffff:10.1.2.3")
    assert not permits(policy, "192.168.1.8")
    assert not permits(policy, "8.8.8.8")


def test_the_word_public_adds_the_default_to_a_list() -> None:
    policy = AddressPolicy.parse("public,10.0.0.0/8")

    assert permits(policy, "8.8.8.8") and permits(policy, "10.0.0.1") and not permits(policy, "192.168.0.1")


def test_a_listed_host_name_may_resolve_to_a_private_address() -> None:
    policy = AddressPolicy.parse("GPU.lan,*.cluster.test")

    assert permits(policy, "10.0.0.1", "gpu.lan") and permits(policy, "10.0.0.1", "gpu.LAN.")
    assert permits(policy, "10.0.0.1", "a.b.cluster.test")
    assert not permits(policy, "10.0.0.1", "cluster.test")
    assert not permits(policy, "10.0.0.1", "notgpu.lan")


@pytest.mark.parametrize("allow", ["10.0.0.0/33", "a b", "http://x", "*.", "-.-/", "**"])
def test_a_setting_that_cannot_be_read_is_refused_in_one_line(allow: str) -> None:
    with pytest.raises(AllowError, match="MILLRACE_NODE_ALLOW") as caught:
        AddressPolicy.parse(allow)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base", "host", "port"),
    [
        ("https://your-gpu.com", "https://your-gpu.com", "your-gpu.com", 443),
        ("http://your-gpu.com:8000/v1/", "http://your-gpu.com:8000/v1", "your-gpu.com", 8000),
        ("http://[2606:4700::1111]:8000", "http://[2606:4700::1111]:8000", "2606:4700::1111", 8000),
        ("HTTPS://GPU.Example.Com/", "https://gpu.example.com", "gpu.example.com", 443),
        ("http://xn--exmple-cua.com", "http://xn--exmple-cua.com", "xn--exmple-cua.com", 80),
    ],
)
def test_a_base_url_is_taken_apart_as_the_client_will_do_it(url: str, base: str, host: str, port: int) -> None:
    target = parse_target(url, PUBLIC)

    assert (target.url, target.host, target.port) == (base, host, port)


@pytest.mark.parametrize(
    "url",
    [
        *("", "your-gpu.com", "ftp://h.com", "file:///etc/passwd", "gopher://h.com", "//h.com", "http://", "http:///x"),
        *(
            "http://user@h.com",
            "http://u:p@h.com",
            "http://:p@h.com",
            "http://h.com/?x=1",
            "http://h.com/#f",
            "http://h.com?",
        ),
        *(
            "http://h.com:0",
            "http://h.com:70000",
            "http://h.com:x",
            "http://h.com:6379",
            "http://h.com:22",
            "http://h.com:25",
        ),
        *(
            "http://h.com/a b",
            "http://h.com/\n",
            "http://h.com\\@127.0.0.1",
            "http://[::1",
            "http://h.com/" + "x" * 3000,
        ),
        *(
            "http://127.0.0.1",
            "http://[::1]",
            "http://10.0.0.1:8000",
            "http://[::ffff:127.0.0.1]",
            "http://169.254.169.254",
        ),
        *(
            "http://①②⑦.0.0.1/",
            "http://[fe80::1%25eth0]/",
            "http://metadata.google.internal",
            "http://METADATA.google.internal.",
        ),
    ],
)
def test_a_url_that_may_not_be_called_is_refused_before_anything_is_resolved(url: str) -> None:
    with pytest.raises(AddressRefused):
        parse_target(url, PUBLIC)


def test_one_refused_answer_refuses_the_name() -> None:
    """A mixed answer is how rebinding begins: the client would fall over to the private address."""
    with pytest.raises(AddressRefused, match=r"mixed\.test"):
        check_answers("mixed.test", [answer("8.8.8.8"), answer("127.0.0.1")], PUBLIC)


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1%2", "::ffff:169.254.169.254", "0.0.0.0"])
def test_no_socket_is_opened_to_what_is_never_called(address: str) -> None:
    with pytest.raises(AddressRefused):
        open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80)))


def test_odd_spellings_of_numbers_are_names_and_meet_the_resolver() -> None:
    assert [as_address(text) for text in ("127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1")] == [None] * 4


def test_loopback_is_not_among_what_is_never_called() -> None:
    assert not is_never(ipaddress.ip_address("127.0.0.1")) and not is_never(ipaddress.ip_address("::1"))


# --- against a real server ----------------------------------------------------------------------------------------


def answer(address: str, port: int = 80) -> ResolveResult:
    return ResolveResult(hostname="x", host=address, port=port, family=socket.AF_INET, proto=0, flags=0)


class Names(AbstractResolver):
    """A resolver that answers each question from its script, the last answer for ever."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        return [answer(self.answers[min(self.asked, len(self.answers)) - 1], port)]

    async def close(self) -> None:
        pass


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPFound("http://169.254.169.254/latest")

    app = web.Application()
    app.router.add_get("/", hello)
    app.router.add_get("/away", away)
    running = TestServer(app, host="127.0.0.1")
    await running.start_server()
    yield running
    await running.close()


async def test_a_permitted_name_is_called_at_the_address_that_was_checked(server: TestServer) -> None:
    names = Names("127.0.0.1")
    async with guarded_session(AddressPolicy.parse("gpu.lan"), inner=names) as session:
        async with session.get(f"http://gpu.lan:{server.port}/") as response:
            assert await response.text() == "hello"

    assert names.asked == 1


async def test_a_name_is_resolved_by_the_system_and_checked(server: TestServer) -> None:
    async with guarded_session(AddressPolicy.parse("127.0.0.0/8,::1")) as session:
        async with session.get(f"http://localhost:{server.port}/") as response:
            assert await response.text() == "hello"
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await session.get("http://no-such-name.invalid/")


async def test_a_name_that_resolves_to_loopback_is_not_called_by_default(server: TestServer) -> None:
    async with guarded_session(PUBLIC, inner=Names("127.0.0.1")) as session:
        with pytest.raises(AddressRefused):
            await session.get(f"http://innocent.test:{server.port}/")


async def test_a_name_that_is_bound_again_after_the_check_is_refused_at_the_connection(server: TestServer) -> None:
    """DNS rebinding: public when the health check looks, loopback when the relay calls."""
    names = Names("8.8.8.8", "127.0.0.1")
    policy = PUBLIC
    first = await names.resolve("innocent.test")
    check_answers("innocent.test", first, policy)

    async with guarded_session(policy, inner=names) as session:
        with pytest.raises(AddressRefused):
            await session.get(f"http://innocent.test:{server.port}/")


async def test_a_literal_address_meets_the_same_rules_inside_the_session(server: TestServer) -> None:
    """The connector does not ask a resolver for literals: the session's own gate must."""
    async with guarded_session(PUBLIC) as session:
        with pytest.raises(AddressRefused):
            await session.get(f"http://127.0.0.1:{server.port}/")


async def test_a_redirect_that_is_followed_by_mistake_meets_the_gate_again(server: TestServer) -> None:
    async with guarded_session(ANY) as session:
        with pytest.raises(AddressRefused):
            await session.get(f"http://127.0.0.1:{server.port}/away")


async def test_an_odd_spelling_is_refused_or_resolved_but_never_slips_through(server: TestServer) -> None:
    async with guarded_session(PUBLIC) as session:
        for host in ("127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1", "localhost"):
            with pytest.raises((AddressRefused, aiohttp.ClientError)):
                await session.get(f"http://{host}:{server.port}/")
