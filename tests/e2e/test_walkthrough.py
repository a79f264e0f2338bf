"""The README's walk, in order, against `millrace up` with the real model and the real times."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from bus.settings import Settings
from tests.conftest import wait_until
from tests.harness.fake_openai import FakeNode
from tests.harness.fleet import ROOT
from tests.operator.fleet import UpProcess

pytestmark = pytest.mark.slow
MODEL_PATH = ROOT / Settings().var_dir / "models" / Settings().model
REAL_TIME = {
    "MILLRACE_ENGINE": "torch",
    "MILLRACE_MODEL_PATH": str(MODEL_PATH),
    "MILLRACE_NODE_ALLOW": "127.0.0.0/8",
    "MILLRACE_THREADS": "1",
}
REGISTRATION = {"node_id": "test-node", "capabilities": {"gpu_memory_gb": 24, "layers": [0, 1, 2, 3]}}
NODE_TTL_S = Settings().node_ttl_ms / 1000


class Walk:
    """Calls to either gateway of the running fleet."""

    def __init__(self, http: aiohttp.ClientSession, bases: list[str], key: str) -> None:
        self.http = http
        self.bases = bases
        self.key = {"Authorization": f"Bearer {key}"}

    async def call(
        self, method: str, path: str, body: Any = None, *, base: int = 0, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = None if body is None else orjson.dumps(body)
        url = self.bases[base] + path
        async with self.http.request(method, url, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def nodes(self, base: int) -> dict[str, Any]:
        status, body = await self.call("GET", "/api/gpu/status", base=base)
        assert status == 200
        assert body["total_nodes"] == body["active_nodes"] + body["inactive_nodes"] == len(body["nodes"])
        return {node["node_id"]: node for node in body["nodes"]}

    async def is_inactive(self, node: str) -> bool:
        return bool((await self.nodes(0))[node]["status"] == "inactive")


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[UpProcess]:
    procfile = (ROOT / "Procfile").read_text().splitlines()
    lines = [line.replace("${PYTHON:-.venv/bin/python}", "$PYTHON") for line in procfile]
    fleet = UpProcess(
        tmp_path / "fleet", *(line.replace("{", "{{").replace("}", "}}") for line in lines), settings=REAL_TIME
    )
    try:
        await wait_until(lambda: "Ctrl-C stops" in fleet.output or fleet.process.poll() is not None, timeout_s=120)
        assert fleet.process.poll() is None, fleet.output
        yield fleet
    finally:
        await asyncio.to_thread(fleet.close)


@pytest.fixture
async def walk(up: UpProcess) -> AsyncIterator[Walk]:
    key = (up.folder / "var" / "api-key").read_text().strip()
    async with aiohttp.ClientSession() as http:
        yield Walk(http, [f"http://127.0.0.1:{port}" for port in up.ports], key)


async def test_the_commands_of_the_readme_give_what_they_promise(up: UpProcess, walk: Walk) -> None:
    own = await walk.nodes(0)
    assert len(own) == 1, "the fleet's own torch worker"

    async with FakeNode() as fake:
        # Registered at one gateway, shown by both at once, five times in a row.
        status, answer = await walk.call(
            "POST", "/api/gpu/register", {**REGISTRATION, "api_url": fake.url}, headers=walk.key
        )
        assert status == 200, answer
        assert answer["success"] and answer["node_id"] == "test-node" and answer["layers_assigned"] == [0, 1, 2, 3]
        for base in (0, 1) * 5:
            assert (await walk.nodes(base))["test-node"]["status"] == "active"

        # Both forms of a heartbeat, at either gateway; an unknown node is told to register.
        for base, body in enumerate(["test-node", {"node_id": "test-node"}]):
            status, answer = await walk.call("POST", "/api/gpu/heartbeat", body, base=base, headers=walk.key)
            assert status == 200, answer
        beaten_at = time.monotonic()
        status, _ = await walk.call("POST", "/api/gpu/heartbeat", "nobody", headers=walk.key)
        assert status == 404

        # A chat without a key, answered by the real model.
        status, answer = await walk.call("POST", "/api/chat/gpu", {"prompt": "Hello", "max_new_tokens": 50})
        assert status == 200, answer
        assert answer["success"] is True
        assert answer["node_id"] in own
        words = answer["response"].split()
        assert len(words) >= 3, answer
        assert answer["response"].isascii(), "English is expected"

        # The accounted chat wants a key and an address.
        body = {"prompt": "What is the capital of France?", "max_new_tokens": 20, "temperature": 0}
        address = {"X-User-Address": "someone"}
        assert (await walk.call("POST", "/api/chat", body, headers=address))[0] == 401
        assert (await walk.call("POST", "/api/chat", body, headers=walk.key))[0] == 400
        status, answer = await walk.call("POST", "/api/chat", body, base=1, headers={**walk.key, **address})
        assert status == 200, answer
        assert "Paris" in answer["response"]

        # Without beats the node turns inactive after 30 s, and is still counted.
        await wait_until(lambda: walk.is_inactive("test-node"), timeout_s=NODE_TTL_S + 10, step_s=0.25)
        silent_s = time.monotonic() - beaten_at
        assert NODE_TTL_S - 2 < silent_s < NODE_TTL_S + 5
        for base in (0, 1):
            assert "test-node" in await walk.nodes(base)

    created = await asyncio.to_thread(up.command, "keys", "create", "--scope", "chat", "--json")
    assert created.returncode == 0, created.stderr
    assert {"id", "key", "scopes"} <= set(orjson.loads(created.stdout))
