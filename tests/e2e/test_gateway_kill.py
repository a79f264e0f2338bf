"""A gateway dies with its streams open: clients go on at the other one, and no answer has a gap or a repeat."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from tests.conftest import wait_until
from tests.e2e.test_kills import ends_by_job, live_nodes, nothing_is_left
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer, free_port

JOBS = 200
TOKENS = 20


class House:
    """A fleet with two gateways, and a client that reads streams as a browser's EventSource would."""

    def __init__(self, fleet: Fleet, http: aiohttp.ClientSession, bases: list[str]) -> None:
        self.fleet = fleet
        self.http = http
        self.bases = bases

    async def ask(self, number: int, base: str, other: str) -> str:
        """Even numbers stream and resume by Last-Event-ID; odd ones ask again with their idempotency key."""
        body = {
            "model": "echo",
            "messages": [{"role": "user", "content": f"[[tokens={TOKENS} delay_ms=25]] job number {number} says"}],
            "stream": number % 2 == 0,
        }
        headers = {"Idempotency-Key": f"job-{number}", "Content-Type": "application/json"}
        text, job, last_id = "", "", ""
        try:
            async with self.http.post(f"{base}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
                if number % 2:
                    return str((await response.json())["choices"][0]["message"]["content"])
                job = response.headers["X-Job-Id"]
                async for event_id, piece in events(response):
                    if piece is None:
                        return text
                    text, last_id = text + piece, event_id or last_id
        except aiohttp.ClientError:
            assert base != other, "the gateway that lives must not break a stream"
        if number % 2 or not job:
            return await self.ask(number, other, other)
        url = f"{other}/v1/jobs/{job}/events"
        async with self.http.get(url, headers={"Last-Event-ID": last_id} if last_id else {}) as response:
            assert response.status == 200, await response.text()
            async for _, piece in events(response):
                if piece is None:
                    return text
                text += piece
        raise AssertionError("a stream without an end")

    async def ask_all(self) -> list[str]:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(self.ask(number, self.bases[number % 4 // 2], self.bases[1]))
                for number in range(JOBS)
            ]
        return [task.result() for task in asked]


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str | None]]:
    """(SSE id, text) of each event; (.., None) for [DONE]. An error event fails the test."""
    event_id = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("id: "):
            event_id = line[4:]
        elif line == "data: [DONE]":
            yield event_id, None
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            yield event_id, "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


@pytest.fixture
async def house(own_server: ValkeyServer, tmp_path: Path) -> AsyncIterator[House]:
    ports = [free_port(), free_port()]
    bases = [f"http://127.0.0.1:{port}" for port in ports]
    with Fleet(own_server.url, tmp_path, model="echo", capacity=256, open_rate_per_minute=0) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        fleet.start("gpu_worker", "--engine", "echo", node_id="echo-1")
        for port in ports:
            fleet.start("gateway", "--port", str(port))
        async with client(ServerAddress.parse(own_server.url)) as redis:
            key = (await ApiKeys(redis).create(["chat"])).key
        await wait_until(lambda: live_nodes(own_server, 1), timeout_s=20)
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as http:
            for base in bases:
                await wait_until(partial(is_ready, http, base), timeout_s=20)
            yield House(fleet, http, bases)


async def is_ready(http: aiohttp.ClientSession, base: str) -> bool:
    try:
        async with http.get(f"{base}/ready") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_200_jobs_end_once_when_a_gateway_the_dispatcher_and_the_registry_are_killed(
    house: House, own_server: ValkeyServer
) -> None:
    roles = {role.name.rpartition("-")[0]: role for role in reversed(house.fleet.roles)}

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        running = group.create_task(house.ask_all())
        await asyncio.sleep(0.4)
        roles["gateway"].kill()  # parent and child: nobody restarts it
        roles["dispatcher"].kill_child()
        roles["registry_consumer"].kill_child()
    answers = running.result()

    for number, answer in enumerate(answers):
        assert len(answer.split()) == TOKENS, f"job {number}: {answer!r}"
        assert answer == answers[0].replace("number 0", f"number {number}"), f"job {number}: {answer!r}"
    ends = await ends_by_job(own_server)
    assert set(ends.values()) == {1}
    await wait_until(lambda: nothing_is_left(own_server), timeout_s=20)
