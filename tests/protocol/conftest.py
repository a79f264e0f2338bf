"""A world per test, on an empty real server."""

import pytest

from bus.link import Link
from tests.protocol.world import World, make_world


@pytest.fixture
async def world(link: Link) -> World:
    return await make_world(link)
