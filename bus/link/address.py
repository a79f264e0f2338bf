"""Where the server is: `REDIS_URL` parsed once into a value.

    redis://[user:password@]host[:port][/db]              one server
    rediss://...?ssl_ca_certs=/path/ca.pem                the same over TLS
    unix://[user:password@]/path/to/socket[?db=1]         one server on this machine
    redis+sentinel://[user:password@]h:p,h:p/name[/db]    the master called `name`, asked from these sentinels
    redis+cluster://[user:password@]h:p,h:p               a cluster, from any of these nodes

`rediss+sentinel` and `rediss+cluster` speak TLS to every machine; `valkey` may stand wherever `redis` does.
Options: ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_check_hostname (true|false), ssl_cert_reqs (required|none);
sentinel_username and sentinel_password for sentinels with a login of their own. The user and password in the
address are the server's. Special characters in them are percent-encoded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from bus.link.errors import AddressError

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
NODES_KEPT = 32
_OPTIONS = {
    "db",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_check_hostname",
    "ssl_cert_reqs",
    "sentinel_username",
    "sentinel_password",
}


class Kind(StrEnum):
    SINGLE = "single"
    UNIX = "unix"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Endpoint(NamedTuple):
    """One machine and port; for a unix socket the path, with port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


@dataclass(frozen=True, slots=True)
class Tls:
    ca_file: str | None = None  # None: the system's certificates
    cert_file: str | None = None
    key_file: str | None = None
    check_hostname: bool = True
    verify: bool = True


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """`endpoints`: the server itself, or the sentinels, or the cluster nodes to ask first."""

    kind: Kind
    endpoints: tuple[Endpoint, ...]
    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: Tls | None = None
    master_name: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """Raises AddressError with one line that says what is wrong (never the password)."""
        return _parse(url)

    def at(self, endpoint: Endpoint) -> "ServerAddress":
        """The same login and TLS, but one plain server at `endpoint`."""
        return replace(self, kind=Kind.SINGLE, endpoints=(endpoint,), master_name="")

    def with_nodes(self, nodes: Iterable[Endpoint]) -> "ServerAddress":
        """A cluster's further nodes, so that it is found again when all that were named first are gone."""
        return replace(self, endpoints=tuple(dict.fromkeys((*self.endpoints, *nodes)))[:NODES_KEPT])

    @property
    def is_local(self) -> bool:
        return self.kind is Kind.UNIX or all(_is_loopback(endpoint.host) for endpoint in self.endpoints)

    def __str__(self) -> str:
        """For logs and errors: without any secret."""
        if self.kind is Kind.UNIX:
            return f"unix://{self.endpoints[0].host}"
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind is Kind.SINGLE else f"+{self.kind}")
        path = "".join(f"/{part}" for part in (self.master_name, str(self.db) if self.db else "") if part)
        return f"{scheme}://{','.join(map(str, self.endpoints))}{path}"

    def __repr__(self) -> str:
        return f"ServerAddress({self})"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _parse(url: str) -> ServerAddress:
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise AddressError(f"REDIS_URL: {error}") from None
    scheme = parts.scheme.replace("valkeys", "rediss").replace("valkey", "redis")
    base, _, form = scheme.partition("+")
    if scheme != "unix" and not (base in {"redis", "rediss"} and form in {"", "sentinel", "cluster"}):
        raise AddressError(
            "REDIS_URL must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
            + (f", not {parts.scheme}://" if parts.scheme else "")
        )
    if parts.fragment:
        raise AddressError("REDIS_URL holds a '#': percent-encode it as %23 in the password")
    options = _options(parts)
    username, password, hosts = _login(parts.netloc)
    tls = _tls(options) if base == "rediss" else None
    if tls is None and any(name.startswith("ssl_") for name in options):
        raise AddressError("REDIS_URL has ssl_ options but no TLS: write rediss:// instead of redis://")
    if scheme == "unix":
        if hosts or not parts.path:
            raise AddressError("REDIS_URL: a unix socket is written unix:///path/to/socket")
        return ServerAddress(
            Kind.UNIX, (Endpoint(unquote(parts.path), 0),), username, password, _db(options.get("db", "0"))
        )
    kind = Kind(form) if form else Kind.SINGLE
    endpoints = _endpoints(hosts, DEFAULT_SENTINEL_PORT if kind is Kind.SENTINEL else DEFAULT_PORT)
    names = [unquote(part) for part in parts.path.split("/") if part]
    master_name = ""
    if kind is Kind.SENTINEL:
        if not names:
            raise AddressError("REDIS_URL: redis+sentinel://host:port,host:port/NAME needs the master's name")
        master_name = names.pop(0)
    elif kind is Kind.SINGLE and len(endpoints) > 1:
        raise AddressError("REDIS_URL names several hosts: write redis+sentinel:// or redis+cluster://")
    db = _db(names.pop(0) if names else options.get("db", "0"))
    if names:
        raise AddressError(f"REDIS_URL: nothing is expected after the database number, but found {'/'.join(names)!r}")
    if kind is Kind.CLUSTER and db:
        raise AddressError("REDIS_URL: a cluster has only database 0")
    return ServerAddress(
        kind,
        endpoints,
        username,
        password,
        db,
        tls,
        master_name,
        options.get("sentinel_username"),
        options.get("sentinel_password"),
    )


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - _OPTIONS):
        raise AddressError(f"REDIS_URL: unknown option {unknown[0]!r}; known are {', '.join(sorted(_OPTIONS))}")
    return options


def _login(netloc: str) -> tuple[str | None, str | None, str]:
    login, _, hosts = netloc.rpartition("@")
    user, _, password = login.partition(":")
    return unquote(user) or None, unquote(password) or None, hosts


def _endpoints(hosts: str, default_port: int) -> tuple[Endpoint, ...]:
    endpoints = tuple(_endpoint(part, default_port) for part in hosts.split(",") if part)
    if not endpoints:
        raise AddressError("REDIS_URL names no host: write for example redis://127.0.0.1:6379")
    return endpoints


def _endpoint(text: str, default_port: int) -> Endpoint:
    if text.startswith("["):  # IPv6: [::1]:6379
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise AddressError(f"REDIS_URL: {text!r} is no host:port")
    return Endpoint(host, int(port or default_port))


def _db(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise AddressError(f"REDIS_URL: the database must be a number, not {text!r}")
    return int(text)


def _tls(options: dict[str, str]) -> Tls:
    flags = {"true": True, "1": True, "false": False, "0": False}
    check = flags.get(options.get("ssl_check_hostname", "true").lower())
    reqs = options.get("ssl_cert_reqs", "required")
    if check is None or reqs not in {"required", "none"}:
        raise AddressError("REDIS_URL: ssl_check_hostname is true or false, ssl_cert_reqs is required or none")
    verify = reqs == "required"
    return Tls(
        ca_file=options.get("ssl_ca_certs"),
        cert_file=options.get("ssl_certfile"),
        key_file=options.get("ssl_keyfile"),
        check_hostname=check and verify,
        verify=verify,
    )
