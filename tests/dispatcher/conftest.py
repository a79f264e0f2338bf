"""A cell with times that suit a node driven by hand, and dispatchers that run in the test's process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from bus.cell import Cell
from bus.link import Link
from bus.process.child import ParentLine
from bus.settings import Settings
from dispatcher.service import run
from tests.harness.servers import ValkeyServer

Dispatching = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture
def settings(server: ValkeyServer) -> Settings:
    """Nothing lapses by itself: leases, reservations and beats outlive the test."""
    return Settings().changed(
        redis_url=server.url,
        lease_ms=60_000,
        renew_ms=200,
        node_ttl_ms=60_000,
        unread_ms=60_000,
        sweep_ms=50,
        block_ms=300,
        take_over_ms=200,
        claim_idle_ms=200,
        backoff_ms=50,
        model="m",
    )


@pytest.fixture
def cell(link: Link, settings: Settings) -> Cell:
    return Cell(link, 0, settings)


@pytest.fixture
def dispatching(settings: Settings) -> Dispatching:
    """`async with dispatching(2):` runs that many dispatchers and stops them in good order."""

    @asynccontextmanager
    async def start(count: int = 1, **changes: object) -> AsyncIterator[None]:
        parent = ParentLine()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(run(settings.changed(**changes), parent))
            yield
            parent.stop.set()

    return start
