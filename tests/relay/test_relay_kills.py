"""A relay process may be killed at any time: its nodes go on elsewhere, and the clients' streams with them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.calls.caller import Caller
from bus.link import ServerAddress
from tests.conftest import wait_until
from tests.harness.fake_openai import FakeNode, Knobs
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer
from tests.relay.test_relay_service import SETTINGS, House, expected, text_of


@pytest.fixture
async def fleet(server: ValkeyServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    relay_settings = {"node_allow": "127.0.0.1", "relay_idle_ms": 1_000, "node_ttl_ms": 60_000}
    with Fleet(server.url, tmp_path, model="fake", **relay_settings) as running:
        running.start("registry_consumer")
        running.start("dispatcher")
        yield running
        await asyncio.to_thread(running.stop)


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with Caller(ServerAddress.parse(server.url), SETTINGS) as caller:
        yield House(server, caller)


@pytest.mark.parametrize("continues", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_a_killed_relay_is_replaced_and_the_stream_goes_on_without_repetition(
    fleet: Fleet, house: House, continues: bool
) -> None:
    relay = fleet.start("gpu_worker", "--engine", "relay", "--node-id", "r1")
    async with FakeNode(Knobs(delay_ms=40, owned_by="vllm" if continues else "fake", continues=continues)) as node:
        await house.register("a", node.url)
        handle = await house.chat(max_tokens=40)
        await wait_until(lambda: node.calls and node.calls[0].tokens_sent > 8, timeout_s=10)

        relay.kill_child()

        text, finished = await text_of(handle, timeout_s=30)
    assert text == expected(40) and finished.ended.state == "done"
    assert len(node.calls) == 2
    assert (await house.view("a")).failed == 0, "not the node's fault"


@pytest.mark.slow
async def test_the_nodes_of_a_lost_machine_are_taken_by_another_relay_when_its_lease_lapses(
    fleet: Fleet, house: House
) -> None:
    relays = [fleet.start("gpu_worker", "--engine", "relay", "--node-id", f"r{number}") for number in (1, 2)]
    async with FakeNode(Knobs(delay_ms=40)) as node:
        await house.register("a", node.url)
        handle = await house.chat(max_tokens=60)
        await wait_until(lambda: node.calls and node.calls[0].tokens_sent > 8, timeout_s=10)
        owner = (await house.view("a")).owner

        relays[0 if owner.startswith("relay:r1.") else 1].kill()

        text, finished = await text_of(handle, timeout_s=30)
        assert text == expected(60) and finished.ended.state == "done"
        assert (await house.view("a")).owner != owner
