"""Find the right server and open a connection to it: discovery, handshake, and what INFO says about who answered."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from bus.link.address import Endpoint, Kind, ServerAddress
from bus.link.errors import LinkDown, ServerError, to_server_error
from bus.link.wire import Wire


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """INFO, read at every connect."""

    endpoint: Endpoint
    fields: Mapping[str, str]
    client_id: int  # of this connection, for CLIENT UNBLOCK and CLIENT KILL
    nodes: tuple[Endpoint, ...] = ()  # masters of the cluster, if it was asked

    @property
    def run_id(self) -> str:
        """Changes when the server restarts or another one answers: then its memory may have gone back in time."""
        return self.fields.get("run_id", "")

    @property
    def version(self) -> str:
        return self.fields.get("redis_version", "")


async def dial(
    address: ServerAddress, *, name: str, cell_key: str, timeout_s: float, hint: Endpoint | None = None
) -> tuple[Wire, ServerInfo]:
    """A connection to the master that owns `cell_key` (on a cluster) or to the only or current master.

    hint: try this node first (a MOVED named it). Raises LinkDown(maybe_sent=False) when nobody fit answers in
    timeout_s, ServerError when the login is refused.
    """
    try:
        async with asyncio.timeout(timeout_s):
            connection, info = await _dial(address, name, cell_key, timeout_s, hint)
    except TimeoutError:
        raise LinkDown(f"{address} did not answer within {timeout_s:g} s", maybe_sent=False) from None
    return Wire(connection), info


async def _dial(
    address: ServerAddress, name: str, cell_key: str, timeout_s: float, hint: Endpoint | None
) -> tuple[AbstractConnection, ServerInfo]:
    nodes: tuple[Endpoint, ...] = ()
    match address.kind:
        case Kind.SENTINEL:
            endpoint = await ask_sentinels(address, timeout_s)
        case Kind.CLUSTER if hint is not None:
            endpoint = hint
        case Kind.CLUSTER:
            endpoint, nodes = await ask_cluster(address, cell_key, timeout_s)
        case _:
            endpoint = address.endpoints[0]
    connection = connection_to(address, endpoint, name=name, timeout_s=timeout_s)
    try:
        await open_connection(connection)
        info = await _read_info(connection, endpoint, nodes)
        _check_usable(info)
        _raise_if_cancelled()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection, info


def _raise_if_cancelled() -> None:
    """redis-py 8.1 now and then swallows a cancellation while it connects; its task would wait for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def connection_to(address: ServerAddress, endpoint: Endpoint, *, name: str, timeout_s: float) -> AbstractConnection:
    """A redis-py connection, not yet open, with none of its retries, health checks or notifications."""
    return _connection(address, endpoint, connection_options(address, name=name, timeout_s=timeout_s))


def connection_options(address: ServerAddress, *, name: str | None, timeout_s: float) -> dict[str, Any]:
    return {
        "username": address.username,
        "password": address.password,
        "db": address.db,
        "client_name": to_client_name(name) if name else None,
        "driver_info": None,  # no CLIENT SETINFO: one thing less that an ACL user needs
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": 0,
    }


def to_client_name(name: str) -> str:
    """As CLIENT SETNAME takes it: printable ASCII without spaces."""
    return "".join(letter if "!" <= letter <= "~" else "-" for letter in name)


def tls_options(address: ServerAddress) -> dict[str, Any]:
    tls = address.tls
    if tls is None:
        return {}
    return {
        "ssl_ca_certs": tls.ca_file,
        "ssl_certfile": tls.cert_file,
        "ssl_keyfile": tls.key_file,
        "ssl_check_hostname": tls.check_hostname,
        "ssl_cert_reqs": "required" if tls.verify else "none",
    }


def _connection(address: ServerAddress, endpoint: Endpoint, options: dict[str, Any]) -> AbstractConnection:
    if address.kind is Kind.UNIX:
        return UnixDomainSocketConnection(path=endpoint.host, **options)
    if address.tls is not None:
        return SSLConnection(host=endpoint.host, port=endpoint.port, **tls_options(address), **options)
    return Connection(host=endpoint.host, port=endpoint.port, **options)


async def open_connection(connection: AbstractConnection) -> None:
    """Connect and log in. Raises LinkDown or, when the server refuses the login, ServerError."""
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py: untyped
    except (redis_errors.AuthenticationError, redis_errors.AuthorizationError, redis_errors.NoPermissionError) as error:
        raise ServerError("WRONGPASS", str(error)) from error
    except redis_errors.ResponseError as error:
        raise to_server_error(str(error)) from error
    except (redis_errors.RedisError, OSError) as error:
        raise LinkDown(str(error), maybe_sent=False) from error


async def ask(connection: AbstractConnection, *command: str) -> Any:
    """One command outside the hot path. Raises LinkDown(maybe_sent=True) or ServerError."""
    try:
        await connection.send_command(*command)
        return await connection.read_response()
    except redis_errors.ResponseError as error:
        code = getattr(error, "status_code", None)
        raise ServerError(code, str(error)) if code else to_server_error(str(error)) from error
    except (redis_errors.RedisError, OSError) as error:
        raise LinkDown(str(error), maybe_sent=True) from error


async def _read_info(connection: AbstractConnection, endpoint: Endpoint, nodes: tuple[Endpoint, ...]) -> ServerInfo:
    raw = await ask(connection, "INFO")
    client_id = await ask(connection, "CLIENT", "ID")
    return ServerInfo(endpoint, parse_info(raw), client_id, nodes)


def parse_info(raw: bytes) -> dict[str, str]:
    lines = raw.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def _check_usable(info: ServerInfo) -> None:
    """Raises LinkDown while the server is up but cannot take writes yet, or no longer."""
    if info.fields.get("loading", "0") != "0":
        raise LinkDown(f"{info.endpoint} is still loading its data", maybe_sent=False)
    if info.fields.get("role", "master") != "master":
        raise LinkDown(f"{info.endpoint} is a replica, not the master", maybe_sent=False)


async def ask_sentinels(address: ServerAddress, timeout_s: float) -> Endpoint:
    """The master as the first sentinel that knows it says. Raises LinkDown when none does."""
    login = ServerAddress(Kind.SINGLE, (), address.sentinel_username, address.sentinel_password, 0, address.tls)
    problems = []
    for endpoint in address.endpoints:
        # Each sentinel gets its share of the time: the first one may be a machine that is gone.
        connection = connection_to(login, endpoint, name="", timeout_s=timeout_s / (len(address.endpoints) + 1))
        try:
            await open_connection(connection)
            answer = await ask(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master_name)
            if answer is not None:
                return Endpoint(answer[0].decode(), int(answer[1]))
            problems.append(f"{endpoint} knows no master {address.master_name!r}")
        except (LinkDown, ServerError) as error:
            problems.append(f"{endpoint}: {error}")
        finally:
            await connection.disconnect(nowait=True)
    raise LinkDown("no sentinel named the master: " + "; ".join(problems), maybe_sent=False)


async def ask_cluster(address: ServerAddress, cell_key: str, timeout_s: float) -> tuple[Endpoint, tuple[Endpoint, ...]]:
    """The master of `cell_key`'s slot and all masters, from the first node that answers.

    Raises LinkDown when none does.
    """
    slot = key_slot(cell_key.encode())
    problems = []
    for endpoint in address.endpoints:
        connection = connection_to(address, endpoint, name="", timeout_s=timeout_s / (len(address.endpoints) + 1))
        try:
            await open_connection(connection)
            slots = await ask(connection, "CLUSTER", "SLOTS")
            owner = owner_of(slot, slots, endpoint)
            if owner is not None:
                return owner, masters_of(slots, endpoint)
            problems.append(f"{endpoint}: nobody owns slot {slot}")
        except LinkDown as error:
            problems.append(f"{endpoint}: {error}")
        finally:
            await connection.disconnect(nowait=True)
    raise LinkDown("no cluster node named the owner: " + "; ".join(problems), maybe_sent=False)


def owner_of(slot: int, slots: list[Any], asked: Endpoint) -> Endpoint | None:
    """The master's entry in a CLUSTER SLOTS reply; an empty or unknown host means the machine that was asked."""
    return next((_to_endpoint(master, asked) for first, last, master, *_ in slots if first <= slot <= last), None)


def masters_of(slots: list[Any], asked: Endpoint) -> tuple[Endpoint, ...]:
    return tuple(dict.fromkeys(_to_endpoint(master, asked) for _, _, master, *_ in slots))


def _to_endpoint(node: list[Any], asked: Endpoint) -> Endpoint:
    host = (node[0] or b"").decode()
    return Endpoint(host if host not in {"", "?"} else asked.host, int(node[1]))
