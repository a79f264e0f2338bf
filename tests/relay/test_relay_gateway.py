"""What a client of a gateway sees of HTTP nodes: registered with one call, lost in mid-stream, and nothing shows."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from tests.conftest import wait_until
from tests.harness.fake_openai import FakeNode, Knobs, answer_text
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer, free_port

PROMPT = "Tell me about rivers"


class Front:
    def __init__(self, http: aiohttp.ClientSession, base: str, key: str) -> None:
        self.http = http
        self.base = base
        self.openai = AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)

    async def register(self, name: str, url: str) -> None:
        body = {"node_id": name, "api_url": url, "capabilities": {"gpu_memory_gb": 24, "max_concurrency": 2}}
        async with self.http.post(f"{self.base}/api/gpu/register", json=body) as response:
            assert response.status == 200, await response.text()

    async def status(self) -> dict[str, dict[str, object]]:
        async with self.http.get(f"{self.base}/api/gpu/status") as response:
            return {node["node_id"]: node for node in (await response.json())["nodes"]}

    async def can_chat(self) -> bool:
        async with self.http.post(f"{self.base}/api/chat/gpu", json={"prompt": "x", "max_new_tokens": 1}) as response:
            return response.status == 200


@pytest.fixture
async def front(server: ValkeyServer, tmp_path: Path) -> AsyncIterator[Front]:
    port = free_port()
    relay = {"node_allow": "127.0.0.1", "relay_idle_ms": 500, "relay_first_byte_ms": 1_000}
    with Fleet(server.url, tmp_path, model="fake", node_ttl_ms=60_000, open_rate_per_minute=0, **relay) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        fleet.start("gpu_worker", "--engine", "relay")
        fleet.start("gateway", "--port", str(port))
        async with client(ServerAddress.parse(server.url)) as redis:
            key = (await ApiKeys(redis).create(["chat", "node"])).key
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
            made = Front(http, f"http://127.0.0.1:{port}", key)

            async def is_up() -> bool:
                try:
                    await made.status()
                except aiohttp.ClientError:
                    return False
                return True

            await wait_until(is_up, timeout_s=20, step_s=0.1)
            yield made
            await made.openai.close()


@pytest.mark.slow
async def test_a_lost_http_node_does_not_show_in_a_clients_stream(front: Front) -> None:
    knobs = {"delay_ms": 30, "silent_at": 6}
    async with FakeNode(Knobs(**knobs)) as a, FakeNode(Knobs(**knobs)) as b:  # type: ignore[arg-type]  # ints all
        await front.register("a", a.url)
        await front.register("b", f"{b.url}/v1")
        await wait_until(front.can_chat, timeout_s=10, step_s=0.1)
        stream = await front.openai.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": PROMPT}], max_tokens=20, stream=True
        )
        text, reasons = "", []
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
            if text:
                for node in (a, b):
                    if not any(call.body["messages"][0]["content"] == PROMPT for call in node.calls):
                        node.turn(silent_at=None)

        assert text == answer_text(PROMPT, 20)
        assert reasons == ["length"]
        nodes = await front.status()
        assert set(nodes) == {"a", "b"} and all(node["status"] == "active" for node in nodes.values())


async def test_a_registered_node_answers_both_apis_and_its_refusals_reach_the_client(front: Front) -> None:
    async with FakeNode(Knobs(context_length=8)) as node:
        await front.register("a", node.url)
        await wait_until(front.can_chat, timeout_s=10, step_s=0.1)

        body = {"prompt": PROMPT, "max_new_tokens": 5}
        async with front.http.post(f"{front.base}/api/chat/gpu", json=body) as response:
            simple = await response.json()
        too_long = {"model": "fake", "messages": [{"role": "user", "content": "word " * 9}]}
        async with front.http.post(f"{front.base}/v1/chat/completions", json=too_long) as response:
            status, refusal = response.status, await response.json()

    assert simple["success"] and simple["response"] == answer_text(PROMPT, 5) and simple["node_id"] == "a"
    assert status == 400 and refusal["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 8 tokens" in refusal["error"]["message"]
