"""The whole fleet on a cluster and behind sentinels, while slots move and masters die under load."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bus.ids import cell_of_model
from bus.keys import CellKeys
from bus.link import ServerAddress, client
from bus.settings import Settings
from millrace import Client
from tests.conftest import wait_until
from tests.harness.fleet import QUICK, Fleet
from tests.harness.topologies import Cluster, SentinelSet, running_cluster, running_sentinel

pytestmark = pytest.mark.slow

CELLS = 3
SETTINGS = Settings().changed(**QUICK, send_wait_ms=20_000)
TOKENS = 12
JOBS_EACH = 20


def model_of_cell(cell: int) -> str:
    """A model name whose cell it is: a model lives in one cell, with all its nodes."""
    return next(name for name in (f"echo-{number}" for number in range(100)) if cell_of_model(name, CELLS) == cell)


MODELS = [model_of_cell(cell) for cell in range(CELLS)]


async def live_nodes(url: str, wanted: int) -> bool:
    async with client(ServerAddress.parse(url)) as redis:
        return len([key async for key in redis.scan_iter(match="millrace:*:node:*:alive")]) >= wanted


async def chat_all(chats: Client, models: list[str], delay_ms: int) -> list[str]:
    async def one(model: str, number: int) -> str:
        text = ""
        prompt = f"[[tokens={TOKENS} delay_ms={delay_ms}]] job {number} of {model} says"
        async for piece in chats.stream(prompt, model=model, max_tokens=TOKENS):
            text += piece.text
            assert piece.offset == len(text.encode()), "a gap or a repeat"
        return text

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(model, number)) for model in models for number in range(JOBS_EACH)]
    return [task.result() for task in tasks]


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def sentinel_set() -> Iterator[SentinelSet]:
    with running_sentinel() as running:
        yield running


@pytest.fixture
async def cluster_fleet(own_cluster: Cluster, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three cells on three masters, one worker in each."""
    with Fleet(own_cluster.url, tmp_path, cells=CELLS, model=MODELS[0], capacity=32) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        for model in MODELS:
            fleet.start("gpu_worker", "--engine", "echo", node_id=f"node-{model}", model=model, echo_models=model)
        await wait_until(lambda: live_nodes(own_cluster.url, CELLS), timeout_s=30)
        yield fleet


async def test_jobs_of_all_cells_are_served_on_a_cluster_while_slots_move(
    own_cluster: Cluster, cluster_fleet: Fleet
) -> None:
    async with Client(own_cluster.url, model=MODELS[0], settings=SETTINGS) as chats:
        expected = await chat_all(chats, MODELS, delay_ms=1)
        keys = [CellKeys(cell).wake for cell in range(CELLS)]
        async with asyncio.TaskGroup() as group:
            running = group.create_task(chat_all(chats, MODELS, delay_ms=60))
            for key in keys:
                await asyncio.sleep(0.2)
                await asyncio.to_thread(own_cluster.move, key, own_cluster.others(key)[0])

        assert running.result() == expected
        assert await chat_all(chats, MODELS, delay_ms=1) == expected


async def test_every_client_gets_one_answer_through_a_failover(sentinel_set: SentinelSet, tmp_path: Path) -> None:
    """Replication is asynchronous: the new master may lack the last moments; clients submit again what it forgot."""
    with Fleet(sentinel_set.url, tmp_path, model=MODELS[0], capacity=32, send_wait_ms=20_000) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        for number in (1, 2):
            fleet.start("gpu_worker", "--engine", "echo", node_id=f"echo-{number}", echo_models=MODELS[0])
        await wait_until(lambda: live_nodes(sentinel_set.url, 2), timeout_s=30)
        async with Client(sentinel_set.url, model=MODELS[0], settings=SETTINGS) as chats:
            expected = await chat_all(chats, MODELS[:1], delay_ms=1)
            async with asyncio.TaskGroup() as group:
                running = group.create_task(chat_all(chats, MODELS[:1], delay_ms=60))
                await asyncio.sleep(0.3)
                await asyncio.to_thread(sentinel_set.fail_over)
            assert running.result() == expected
            assert await chat_all(chats, MODELS[:1], delay_ms=1) == expected
