"""Fixtures for all tests: one real server per session, empty for each test that asks for it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from bus.link import Link, ServerAddress
from tests.harness.servers import ValkeyServer
from tests.harness.topologies import Cluster, running_cluster
from tests.harness.waiting import wait_until as wait_until  # where most tests look for it


@pytest.fixture(scope="session")
def session_server() -> Iterator[ValkeyServer]:
    """Shared by the session; use `server`, which is empty, or a cell of your own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def server(session_server: ValkeyServer) -> ValkeyServer:
    """A running server without data or scripts."""
    assert session_server.running, "a test stopped the session's server: use own_server for that"
    session_server.call("FLUSHALL")
    session_server.call("SCRIPT", "FLUSH")
    return session_server


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that this test may pause, kill and start again; keeps its data (AOF everysec)."""
    with ValkeyServer(aof="everysec") as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three masters, for slow tests; use cells (hash tags) of your own."""
    with running_cluster() as running:
        yield running


@pytest.fixture
def address(server: ValkeyServer) -> ServerAddress:
    return ServerAddress.parse(server.url)


@pytest.fixture
async def link(address: ServerAddress) -> AsyncIterator[Link]:
    async with await Link.connect(address, name="test") as link:
        yield link
