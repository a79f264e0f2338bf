"""The ambiguous write at every point: the Nth command of one role runs, its reply is lost, the connection breaks.

For N = 1, 2, 3 ... the role cannot know whether its command ran. Every job must still end exactly once, with the text
that an undisturbed run gives, and leave nothing behind.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus.settings import Settings
from millrace import Client
from tests.conftest import wait_until
from tests.e2e.test_kills import ends_by_job, live_nodes, nothing_is_left
from tests.harness.fleet import QUICK, Fleet
from tests.harness.proxies import FaultProxy, fault_proxy
from tests.harness.servers import ValkeyServer

pytestmark = pytest.mark.slow

SETTINGS = Settings().changed(**QUICK)
# How far to go: a round of jobs takes the roles on its way up to 20 commands, leases and blocking reads included.
POINTS = {"registry_consumer": 10, "dispatcher": 30, "gpu_worker": 30, "client": 30}
ROUNDS_MAX = 40  # until the Nth command has come
JOBS = 6
TOKENS = 8


@asynccontextmanager
async def fleet_behind_proxy(server: ValkeyServer, role: str, folder: Path) -> AsyncIterator[tuple[FaultProxy, Client]]:
    """One dispatcher, one registry consumer, two workers and a client; `role` reaches the server by the proxy only."""
    async with fault_proxy(server.port) as proxy:
        urls = {name: proxy.url if name == role else server.url for name in POINTS}
        with (
            Fleet(urls["registry_consumer"], folder / "registry", model="echo") as registry,
            Fleet(urls["dispatcher"], folder / "dispatcher", model="echo") as dispatcher,
            Fleet(urls["gpu_worker"], folder / "worker", model="echo", capacity=4) as worker,
            Fleet(server.url, folder / "other", model="echo", capacity=4) as other,
        ):
            registry.start("registry_consumer")
            dispatcher.start("dispatcher")
            worker.start("gpu_worker", "--engine", "echo", node_id="echo-1")
            other.start("gpu_worker", "--engine", "echo", node_id="echo-2")
            await wait_until(lambda: live_nodes(server, 2), timeout_s=30)
            async with Client(urls["client"], model="echo", settings=SETTINGS) as chats:
                yield proxy, chats


async def answer_all(chats: Client) -> list[str]:
    """Half of the jobs streamed, offsets checked; half whole."""

    async def streamed(prompt: str) -> str:
        text = ""
        async for piece in chats.stream(prompt, max_tokens=TOKENS):
            text += piece.text
            assert piece.offset == len(text.encode()), "a gap or a repeat"
        return text

    async def whole(prompt: str) -> str:
        return (await chats.chat(prompt, max_tokens=TOKENS)).text

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task((streamed if number % 2 else whole)(f"[[tokens={TOKENS} delay_ms=5]] job {number} says"))
            for number in range(JOBS)
        ]
    return [task.result() for task in tasks]


@pytest.mark.parametrize("role", POINTS)
async def test_jobs_end_once_whichever_reply_a_role_loses(own_server: ValkeyServer, role: str, tmp_path: Path) -> None:
    async with fleet_behind_proxy(own_server, role, tmp_path) as (proxy, chats):
        expected = await answer_all(chats)
        rounds = 1
        for nth in range(1, POINTS[role] + 1):
            proxy.swallow_after(nth)
            for _ in range(ROUNDS_MAX):
                answers = await answer_all(chats)
                rounds += 1
                assert answers == expected, f"n={nth}"
                if proxy.swallowed.is_set():
                    break
            assert proxy.swallowed.is_set(), f"n={nth} never came"
            await wait_until(lambda: nothing_is_left(own_server), timeout_s=15)
        ends = await ends_by_job(own_server)

    assert set(ends.values()) == {1}, {job: count for job, count in ends.items() if count != 1}
    assert len(ends) == JOBS * rounds
