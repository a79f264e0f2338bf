"""An ordinary redis.asyncio client for work outside the hot path: the CLI, health checks, tests.

    async with client(address) as redis, redis.pipeline(transaction=False) as pipe:
        pipe.xlen("a"); pipe.xlen("b")
        lengths = await pipe.execute()

It never retries by itself, has no blocking use, and replies are bytes.
"""

from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from bus.link.address import Kind, ServerAddress
from bus.link.dial import connection_options, tls_options

Client = Redis | RedisCluster


def client(address: ServerAddress, *, timeout_s: float = 5.0, connections_max: int = 8) -> Any:
    """A `Redis` (or `RedisCluster`) to be used with `async with`; connects at its first command."""
    options = connection_options(address, name=None, timeout_s=timeout_s)
    tls = {"ssl": True, **tls_options(address)} if address.tls else {}
    match address.kind:
        case Kind.CLUSTER:
            nodes = [ClusterNode(host, port) for host, port in address.endpoints]
            options.pop("db")
            options["retry"] = Retry(NoBackoff(), 3)  # of discovery and MOVED
            return RedisCluster(startup_nodes=nodes, **options, **tls)
        case Kind.SENTINEL:
            login = {"username": address.sentinel_username, "password": address.sentinel_password}
            sentinel = Sentinel(  # type: ignore[no-untyped-call]
                list(address.endpoints), sentinel_kwargs={**options, **login, "db": 0, **tls}, **options, **tls
            )
            return sentinel.master_for(address.master_name)
        case Kind.UNIX:
            return Redis(unix_socket_path=address.endpoints[0].host, max_connections=connections_max, **options)
        case Kind.SINGLE:
            host, port = address.endpoints[0]
            return Redis(host=host, port=port, max_connections=connections_max, **options, **tls)
