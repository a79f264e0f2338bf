"""A node by hand and a caller, on one real server."""

from collections.abc import AsyncIterator

import pytest

from bus.calls.caller import Caller
from bus.link import Link, ServerAddress
from tests.caller.stage import SETTINGS, Stage


@pytest.fixture
async def stage(address: ServerAddress, link: Link) -> AsyncIterator[Stage]:
    stage = await Stage.open(address, link)
    yield stage
    await stage.close()


@pytest.fixture
async def caller(address: ServerAddress, stage: Stage) -> AsyncIterator[Caller]:
    async with Caller(address, SETTINGS) as caller:
        yield caller


@pytest.fixture
async def other(address: ServerAddress, stage: Stage) -> AsyncIterator[Caller]:
    """Another process."""
    async with Caller(address, SETTINGS, name="other") as caller:
        yield caller
