"""Any process may be killed at any time: every job ends exactly once, and no client sees a gap or a repeat."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.link import ServerAddress, client
from bus.settings import Settings
from millrace import Client
from tests.conftest import wait_until
from tests.harness.fleet import QUICK, Fleet
from tests.harness.servers import ValkeyServer

pytestmark = pytest.mark.asyncio
JOBS = 200
TOKENS = 12
SETTINGS = Settings().changed(**QUICK)  # of the clients: as short as the fleet's


def prompt(number: int, *, delay_ms: int = 15) -> str:
    return f"[[tokens={TOKENS} delay_ms={delay_ms}]] job number {number} says"


@pytest.fixture
async def fleet(own_server: ValkeyServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A server with AOF, one registry consumer, one dispatcher, two echo workers."""
    with Fleet(own_server.url, tmp_path, model="echo", capacity=64) as running:
        running.start("registry_consumer")
        running.start("dispatcher")
        for number in (1, 2):
            running.start("gpu_worker", "--engine", "echo", node_id=f"echo-{number}")
        await wait_until(lambda: live_nodes(own_server, 2), timeout_s=20)
        yield running


async def live_nodes(server: ValkeyServer, wanted: int) -> bool:
    async with client(ServerAddress.parse(server.url)) as redis:
        alive = [key async for key in redis.scan_iter(match="millrace:{c0}:node:*:alive")]
    return len(alive) >= wanted


async def ends_by_job(server: ValkeyServer) -> Counter[str]:
    """How many terminals each job has, over all out-streams."""
    ends: Counter[str] = Counter()
    async with client(ServerAddress.parse(server.url)) as redis:
        async for key in redis.scan_iter(match="millrace:{c0}:gateway:*", _type="stream"):
            for _, fields in await redis.xrange(key):
                if fields[b"type"] == b"end":
                    ends[fields[b"job"].decode()] += 1
    return ends


async def nothing_is_left(server: ValkeyServer) -> bool:
    """No job waits, runs or is pending anywhere."""
    async with client(ServerAddress.parse(server.url)) as redis:
        left = 0
        async for key in redis.scan_iter(match="millrace:{c0}:node:*:running"):
            left += await redis.zcard(key)
        async for key in redis.scan_iter(match="millrace:{c0}:node:*:jobs"):
            left += await redis.xlen(key)
            left += sum(group["pending"] for group in await redis.xinfo_groups(key))
        async for key in redis.scan_iter(match="millrace:{c0}:queue:*"):
            left += await redis.xlen(key)
    return left == 0


async def chat_all(chats: Client, *, delay_ms: int = 15) -> list[str]:
    """All jobs at once; each answer as its client put it together from the stream, offsets checked."""

    async def one(number: int) -> str:
        text = ""
        async for piece in chats.stream(prompt(number, delay_ms=delay_ms), model="echo", max_tokens=TOKENS):
            text += piece.text
            assert piece.offset == len(text.encode()), "a gap or a repeat"
        return text

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(JOBS)]
    return [task.result() for task in tasks]


async def expected_answers(chats: Client) -> list[str]:
    """What the same prompts give when nothing is killed."""
    return await chat_all(chats, delay_ms=15)


@pytest.mark.parametrize("victim", ["dispatcher", "registry_consumer", "gpu_worker"])
async def test_every_job_ends_once_when_a_role_is_killed_while_200_jobs_run(
    fleet: Fleet, own_server: ValkeyServer, victim: str
) -> None:
    async with Client(own_server.url, settings=SETTINGS) as chats:
        expected = await expected_answers(chats)
        role = next(role for role in fleet.roles if role.name.startswith(victim))

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = group.create_task(chat_all(chats))
            for _ in range(3):
                await asyncio.sleep(0.15)
                dead = role.kill_child()
                role.child_pid(other_than=dead)
        answers = running.result()

    assert answers == expected
    ends = await ends_by_job(own_server)
    assert len(ends) == 2 * JOBS
    assert set(ends.values()) == {1}
    await wait_until(lambda: nothing_is_left(own_server), timeout_s=10)


async def test_every_client_gets_one_answer_when_the_server_is_killed_and_restarted(
    fleet: Fleet, own_server: ValkeyServer
) -> None:
    """AOF everysec: the server may have lost its last second; clients submit again what it forgot."""
    async with Client(own_server.url, settings=SETTINGS) as chats:
        expected = await expected_answers(chats)

        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            running = group.create_task(chat_all(chats))
            await asyncio.sleep(0.2)
            own_server.kill()
            await asyncio.sleep(0.3)
            own_server.start()
        answers = running.result()

    assert answers == expected
    await wait_until(lambda: nothing_is_left(own_server), timeout_s=20)


async def test_a_lost_machine_costs_one_lease(fleet: Fleet, own_server: ValkeyServer) -> None:
    """Parent and child die together, so nobody calls `down`: the lease has to lapse first."""
    async with Client(own_server.url, settings=SETTINGS) as chats:
        expected = await expected_answers(chats)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = group.create_task(chat_all(chats))
            await asyncio.sleep(0.2)
            fleet.roles[-1].kill()
        answers = running.result()

    assert answers == expected
    assert set((await ends_by_job(own_server)).values()) == {1}


async def test_a_fleet_whose_data_is_wiped_is_whole_again_within_two_beats(
    fleet: Fleet, own_server: ValkeyServer
) -> None:
    """FLUSHALL takes nodes, groups, queues and jobs; callers submit again, workers register by their beats."""
    async with Client(own_server.url, settings=SETTINGS) as chats:
        expected = await expected_answers(chats)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            running = group.create_task(chat_all(chats))
            await asyncio.sleep(0.1)
            own_server.call("FLUSHALL")
            await wait_until(lambda: live_nodes(own_server, 2), timeout_s=2 * QUICK["beat_ms"] / 1000 + 1)
        answers = running.result()

    assert answers == expected
    await wait_until(lambda: nothing_is_left(own_server), timeout_s=20)
