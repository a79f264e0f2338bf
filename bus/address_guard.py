"""Which addresses the fleet may call: the guard against registered URLs that point into our own network (SSRF).

A node's owner chooses its `api_url`, and the gateway (health check) and the relay then send requests there. Three
gates, so that no single trick opens them all:

1. `parse_target` / the session's middleware looks at every URL before anything is resolved: http or https, no
   credentials, no port of a service that is not HTTP, literal addresses checked at once.
2. `GuardedResolver` checks *every* address that a name resolves to and hands the connector only those: the address
   that was checked is the address that is dialled, so a second, different DNS answer (rebinding) never counts.
3. The socket factory checks the address of each connection once more against the list of what is never called.

Embedded IPv4 (mapped, 6to4, NAT64, Teredo, ISATAP) counts as the IPv4 address it leads to. Redirects are refused by
the caller (`allow_redirects=False`); one that is followed by mistake meets gate 1 again.

The setting `node_allow`: empty = public addresses; else a comma list that says all of what is allowed: CIDRs, single
addresses, host names (`gpu.lan`), their subdomains (`*.gpu.lan`), the word `public`, or `*` for any. Metadata
services, link-local, multicast and unspecified addresses are never called, not even with `*`.
"""

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Self

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

URL_CHARS_MAX = 2048

NEVER_NETWORKS: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # "this host": Linux connects to itself
        "169.254.0.0/16",  # link-local; AWS, GCP, Azure, OpenStack metadata
        "100.100.100.200/32",  # Alibaba Cloud metadata
        "168.63.129.16/32",  # Azure WireServer
        "192.0.0.192/32",  # Oracle Cloud metadata
        "224.0.0.0/4",
        "240.0.0.0/4",  # reserved, and broadcast
        "::/128",
        "fe80::/10",
        "fec0::/10",  # site-local, deprecated
        "ff00::/8",
        "fd00:ec2::/32",  # AWS metadata over IPv6
        "fd20:ce::254/128",  # GCP metadata over IPv6
    )
)
NEVER_HOSTS = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})

# is_global of the standard library, and beyond it only what is really handed out as global unicast.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_RELAY_ANYCAST = IPv4Network("192.88.99.0/24")  # 6to4 relays (RFC 7526)
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_SIX_TO_FOUR = IPv6Network("2002::/16")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)

# Fetch standard's "bad ports" that matter here, and the services that live next to a fleet.
BAD_PORTS = frozenset(
    {1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109, 110}
    | {111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531}
    | {532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 5060, 5061}
    | {6000, 6566, 6665, 6666, 6667, 6668, 6669, 6697}
    | {445, 2375, 2376, 2379, 2380, 3306, 3389, 5432, 5672, 6379, 9042, 10250, 11211, 16379, 26379, 27017}
)


class AddressRefused(ValueError):
    """The URL, or what it resolves to, may not be called. The message is for the node's owner."""


class AllowError(ValueError):
    """The setting `node_allow` cannot be read; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A base URL that passed gate 1. `url` has no trailing slash, query or fragment."""

    url: str
    scheme: str
    host: str  # as it will be resolved: lower case, IDNA, without brackets
    port: int


@dataclasses.dataclass(frozen=True)
class AddressPolicy:
    """What may be called. Pure: names are matched as text, addresses as numbers."""

    anything: bool = False
    public: bool = True
    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()
    suffixes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, allow: str) -> Self:
        """Read the setting. Raises AllowError."""
        words = [word.strip().lower() for word in allow.split(",") if word.strip()]
        if not words:
            return cls()
        networks: list[Network] = []
        hosts: set[str] = set()
        suffixes: list[str] = []
        for word in words:
            if word in ("*", "public"):
                continue
            network = _as_network(word)
            if network is not None:
                networks.append(network)
            elif word.startswith("*.") and _is_host_name(word[2:]):
                suffixes.append(word[1:])
            elif _is_host_name(word):
                hosts.add(word)
            else:
                raise AllowError(f"MILLRACE_NODE_ALLOW: {word!r} is no CIDR, address or host name")
        return cls("*" in words, "public" in words, tuple(networks), frozenset(hosts), tuple(suffixes))

    def names(self, host: str) -> bool:
        """Whether the setting lists this host name itself, whatever it resolves to."""
        host = host.rstrip(".").lower()
        return host in self.hosts or host.endswith(self.suffixes)

    def refusal(self, address: Address, host: str = "") -> str | None:
        """Why `address` may not be called, as a sentence; None if it may. `host` is the name that led to it."""
        if is_never(address):
            return f"{address} is a link-local, metadata or special address, which is never called"
        if self.anything or (host and self.names(host)) or any(address in network for network in self.networks):
            return None
        for face in faces(address):
            if not (self.public and is_public(face)) and not any(face in network for network in self.networks):
                return f"{address} is not an address that MILLRACE_NODE_ALLOW permits"
        return None

    def check_host(self, host: str, port: int | None) -> None:
        """Gate 1 without the URL's other parts. Raises AddressRefused."""
        if port is None or not 0 < port < 65_536:
            raise AddressRefused("the URL has no usable port")
        if port in BAD_PORTS:
            raise AddressRefused(f"port {port} belongs to another kind of service")
        if not host:
            raise AddressRefused("the URL has no host")
        if host.rstrip(".").lower() in NEVER_HOSTS:
            raise AddressRefused(f"{host} is a metadata service, which is never called")
        literal = as_address(host)
        if literal is not None and (reason := self.refusal(literal)) is not None:
            raise AddressRefused(reason)


def parse_target(url: str, policy: AddressPolicy) -> Target:
    """Gate 1: a node's base URL. Raises AddressRefused; resolves nothing."""
    if len(url) > URL_CHARS_MAX:
        raise AddressRefused(f"the URL is longer than {URL_CHARS_MAX} characters")
    if any(ord(char) <= 0x20 or char in "\\\x7f" for char in url):
        raise AddressRefused("the URL contains a space, a control character or a backslash")
    try:
        parsed = yarl.URL(url)
        host, port = parsed.raw_host or "", parsed.port
    except ValueError as error:
        raise AddressRefused("the URL cannot be read") from error
    _check_url(parsed, policy)
    if parsed.raw_query_string or parsed.raw_fragment or "?" in url or "#" in url:
        raise AddressRefused("the URL must have no query and no fragment")
    assert port is not None
    return Target(url=str(parsed).rstrip("/"), scheme=parsed.scheme, host=host, port=port)


def _check_url(url: yarl.URL, policy: AddressPolicy) -> None:
    if url.scheme not in ("http", "https"):
        raise AddressRefused("the URL must begin with http:// or https://")
    if url.raw_user is not None or url.raw_password is not None:
        raise AddressRefused("the URL must not contain a user or password")
    policy.check_host(url.raw_host or "", url.port)


# --- addresses as numbers ---------------------------------------------------------------------------------------


def as_address(text: str) -> Address | None:
    """A literal IP address, brackets and zone removed; None for a name.

    Odd spellings (`127.1`, `0x7f.0.0.1`, `2130706433`) are names here: the resolver turns them into addresses, which
    are then checked like any other.
    """
    try:
        return ipaddress.ip_address(text.strip("[]").split("%", 1)[0])
    except ValueError:
        return None


def embedded(address: Address) -> Iterator[IPv4Address]:
    """Every IPv4 address that packets to `address` may end at."""
    if isinstance(address, IPv4Address):
        return
    value = int(address)
    low = IPv4Address(value & 0xFFFF_FFFF)
    if value >> 32 == 0xFFFF or (value >> 32 == 0 and value > 0xFFFF):  # ::ffff:a.b.c.d and the old ::a.b.c.d
        yield low
    if any(address in network for network in _NAT64):
        yield low
    if address in _SIX_TO_FOUR:
        yield IPv4Address(value >> 80 & 0xFFFF_FFFF)
    if address.teredo is not None:
        yield from address.teredo
    if value >> 32 & 0xFFFF_FFFF in _ISATAP:
        yield low


def faces(address: Address) -> tuple[Address, ...]:
    """The addresses that the rules must judge: what is embedded, or the address itself."""
    return tuple(embedded(address)) or (address,)


def is_never(address: Address) -> bool:
    return any(face in network for face in (address, *embedded(address)) for network in NEVER_NETWORKS)


def is_public(address: Address) -> bool:
    """Globally routed unicast."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and address not in _RELAY_ANYCAST
    return address in _GLOBAL_UNICAST and address.is_global


def _as_network(word: str) -> Network | None:
    try:
        return ipaddress.ip_network(word.strip("[]"), strict=False)
    except ValueError:
        return None


def _is_host_name(word: str) -> bool:
    labels = word.rstrip(".").split(".")
    return len(word) <= 253 and all(
        0 < len(label) <= 63 and all(char.isalnum() or char in "-_" for char in label) for label in labels
    )


# --- the thin shell: a resolver, a connector, a session ----------------------------------------------------------


def check_answers(host: str, answers: list[ResolveResult], policy: AddressPolicy) -> list[ResolveResult]:
    """Gate 2, pure. One refused address refuses the name: a mixed answer is how rebinding begins."""
    if not answers:
        raise OSError(f"{host} has no address")
    for answer in answers:
        address = as_address(answer["host"])
        reason = f"{answer['host']!r} is no address" if address is None else policy.refusal(address, host)
        if reason is not None:
            raise AddressRefused(f"{host}: {reason}")
    return answers


class PoolResolver(AbstractResolver):
    """The system's resolver in threads of its own: a name whose server is silent holds up no other name.

    (uvloop resolves in libuv's pool of four threads, which all of the process shares.)
    """

    def __init__(self, threads_max: int = 64) -> None:
        self._pool = ThreadPoolExecutor(threads_max, "resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises OSError if there is no such name."""
        ask = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        answers = await asyncio.get_running_loop().run_in_executor(self._pool, ask)
        return [
            ResolveResult(
                hostname=host, host=str(found[0]), port=port, family=kind, proto=proto, flags=socket.AI_NUMERICHOST
            )
            for kind, _, proto, _, found in answers
        ]

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class GuardedResolver(AbstractResolver):
    """Hands out only addresses that the policy permits. Raises AddressRefused; OSError if there is no such name."""

    def __init__(self, policy: AddressPolicy, inner: AbstractResolver) -> None:
        self._policy = policy
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return check_answers(host, await self._inner.resolve(host, port, family), self._policy)

    async def close(self) -> None:
        await self._inner.close()


def open_socket(addr_info: AddrInfoType) -> socket.socket:
    """Gate 3, for each single connection. Raises AddressRefused."""
    family, kind, proto, _, sockaddr = addr_info
    address = as_address(str(sockaddr[0]))
    if address is None or is_never(address):
        raise AddressRefused(f"{sockaddr[0]} is never called")
    return socket.socket(family, kind, proto)


def guarded_session(
    policy: AddressPolicy,
    *,
    connections_max: int = 100,
    connections_per_host_max: int = 0,
    inner: AbstractResolver | None = None,
) -> aiohttp.ClientSession:
    """A session that calls permitted addresses only: no proxy, no cookies, no decompression, no connection used twice.

    The caller sets the timeouts of each request and passes `allow_redirects=False`. Must be made inside a running
    event loop; the caller closes it. Requests raise AddressRefused beside aiohttp's own errors.
    """

    async def gate(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        _check_url(request.url, policy)
        return await handler(request)

    resolver = GuardedResolver(policy, inner if inner is not None else PoolResolver())
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        limit=connections_max,
        limit_per_host=connections_per_host_max,
        socket_factory=open_socket,
        force_close=True,
    )
    return aiohttp.ClientSession(
        connector=connector,
        middlewares=(gate,),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "millrace"},
        timeout=aiohttp.ClientTimeout(total=30.0),
    )
