"""Log probabilities through real processes, read by the openai package: whole, streamed, resumed, over a death."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionTokenLogprob

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from bus.settings import Settings
from tests.conftest import wait_until
from tests.e2e.test_kills import live_nodes
from tests.e2e.test_torch_kill import MODEL_PATH
from tests.gateway.test_process import answers
from tests.harness.fleet import Fleet, RoleProcess
from tests.harness.servers import ValkeyServer, free_port
from tests.torch_engine.tiny import tiny_model

pytestmark = pytest.mark.slow  # each starts processes that load torch
MESSAGES: Any = [{"role": "user", "content": "Tell me in a few sentences how a water mill works."}]
Tokens = list[ChatCompletionTokenLogprob]


class House:
    """A gateway, and workers that serve one torch model."""

    def __init__(self, key: str, workers: dict[str, RoleProcess], ports: list[int]) -> None:
        self.key = key
        self.workers = workers
        self.bases = [f"http://127.0.0.1:{port}" for port in ports]
        self.openai = openai.AsyncOpenAI(base_url=f"{self.bases[0]}/v1", api_key=key, max_retries=0, timeout=90)

    async def whole(self, **body: Any) -> Any:
        return await self.openai.chat.completions.create(model=Settings().model, messages=MESSAGES, **body)


@asynccontextmanager
async def open_house(
    server: ValkeyServer, tmp_path: Path, model: Path, workers: int, gateways: int = 1
) -> AsyncIterator[House]:
    async with client(ServerAddress.parse(server.url)) as redis:
        key = (await ApiKeys(redis).create(["chat"])).key
    # Not the compiled kernels: each fleet's own directory would have them compiled anew.
    with Fleet(server.url, tmp_path, model_path=model, dtype="float32", threads=1, kernels="torch") as fleet:
        house = await furnish(fleet, server, key, workers, gateways)
        async with house.openai:
            yield house


async def furnish(fleet: Fleet, server: ValkeyServer, key: str, workers: int, gateways: int) -> House:
    fleet.start("registry_consumer")
    fleet.start("dispatcher")
    names = [f"torch-{n}" for n in range(workers)]
    house = House(
        key,
        {name: fleet.start("gpu_worker", node_id=name) for name in names},
        [free_port() for _ in range(gateways)],
    )
    for base in house.bases:
        fleet.start("gateway", "--port", base.rpartition(":")[2])
    async with aiohttp.ClientSession() as http:
        for base in house.bases:
            await wait_until(lambda base=base: answers(http, base, 200), timeout_s=60)  # type: ignore[misc]
    await wait_until(lambda: live_nodes(server, workers), timeout_s=60)
    return house


@pytest.fixture
async def tiny(own_server: ValkeyServer, tmp_path: Path) -> AsyncIterator[House]:
    """A random model that speaks in bytes: its tokens are parts of characters, or of none."""
    async with open_house(own_server, tmp_path, tiny_model(tmp_path / "tiny"), workers=1, gateways=2) as house:
        yield house


def text_of(tokens: Tokens) -> str:
    return b"".join(bytes(one.bytes or []) for one in tokens).decode("utf-8", "replace")


async def stream_of(house: House, **body: Any) -> tuple[str, Tokens, str]:
    """Text, tokens and the job; each chunk's own tokens are checked to begin in its text."""
    text, job = "", ""
    tokens: Tokens = []
    stream = await house.whole(stream=True, logprobs=True, **body)
    async for chunk in stream:
        job = chunk.id.removeprefix("chatcmpl-")
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.logprobs is not None:
                assert choice.delta.content
                tokens += choice.logprobs.content or []
    return text, tokens, job


async def test_whole_and_streamed_answers_bring_the_same_ones(tiny: House) -> None:
    async with asyncio.timeout(60):
        asked = {"max_tokens": 60, "temperature": 0, "seed": 5, "top_logprobs": 4}
        whole = await tiny.whole(logprobs=True, **asked)
        text, streamed, _ = await stream_of(tiny, **asked)
        plain = await tiny.whole(max_tokens=5, temperature=0)

    tokens = whole.choices[0].logprobs.content
    assert text == whole.choices[0].message.content == text_of(tokens)
    assert streamed == tokens
    assert len(tokens) == whole.usage.completion_tokens
    for one in tokens:
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert len(one.top_logprobs) == 4
        assert one.token == bytes(one.bytes).decode("utf-8", "backslashreplace") if one.bytes else one.token
    assert plain.choices[0].logprobs is None


async def test_a_stream_that_breaks_goes_on_with_them_on_another_gateway(tiny: House) -> None:
    """From every event's id: no token twice, none left out."""
    async with asyncio.timeout(60):
        text, tokens, job = await stream_of(
            tiny, max_tokens=40, temperature=0, extra_headers={"X-On-Disconnect": "keep"}
        )
        headers = {"Authorization": f"Bearer {tiny.key}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            for offset in range(0, len(text.encode()), 7):
                resumed = await replay(http, f"{tiny.bases[1]}/v1/jobs/{job}/events", f"{job}.{offset}")
                if resumed:
                    rest = [one.model_dump() for one in tokens][-len(resumed) :]
                    assert resumed == rest
                    assert text.encode().endswith(text_of([ChatCompletionTokenLogprob(**t) for t in resumed]).encode())
            async with http.get(f"{tiny.bases[1]}/v1/jobs/{job}") as got:
                stored = (await got.json())["logprobs"]["content"]

    assert stored == [one.model_dump() for one in tokens]


async def replay(http: aiohttp.ClientSession, url: str, event_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with http.get(url, headers={"Last-Event-ID": event_id}) as got:
        assert got.status == 200, await got.text()
        async for line in got.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    found += (choice["logprobs"] or {"content": []})["content"]
    return found


async def test_the_older_completions_have_four_lists(tiny: House) -> None:
    async with asyncio.timeout(60):
        ask = {"model": Settings().model, "prompt": "the mill", "max_tokens": 30, "temperature": 0, "logprobs": 2}
        whole = await tiny.openai.completions.create(**ask)  # type: ignore[call-overload]
        tokens: list[str] = []
        offsets: list[int] = []
        values: list[float] = []
        async for chunk in await tiny.openai.completions.create(**ask, stream=True):  # type: ignore[call-overload]
            if chunk.choices[0].logprobs is not None:
                tokens += chunk.choices[0].logprobs.tokens
                offsets += chunk.choices[0].logprobs.text_offset
                values += chunk.choices[0].logprobs.token_logprobs

    choice = whole.choices[0]
    lists = choice.logprobs
    assert (tokens, offsets, values) == (lists.tokens, lists.text_offset, lists.token_logprobs)
    assert len(lists.top_logprobs) == len(tokens) == whole.usage.completion_tokens
    for token, at, value, top in zip(tokens, offsets, values, lists.top_logprobs, strict=True):
        assert top[token] == value
        if "\\x" not in token and not token.startswith("<"):
            assert choice.text[at : at + len(token)] == token


@pytest.mark.parametrize(
    ("body", "param"),
    [({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs")],
)
async def test_a_wish_beyond_openais_limits_is_named(tiny: House, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await tiny.whole(**body)

    assert refused.value.param == param


async def test_the_death_of_a_worker_loses_none_and_repeats_none(own_server: ValkeyServer, tmp_path: Path) -> None:
    """The default model, killed twice within one answer: the same values, bit for bit, as in one piece."""
    async with open_house(own_server, tmp_path, MODEL_PATH, workers=2) as house:
        async with asyncio.timeout(170):
            asked = {"max_tokens": 60, "temperature": 0.8, "seed": 11, "top_logprobs": 3, "presence_penalty": 0.4}
            whole = await house.whole(logprobs=True, **asked)
            expected: Tokens = whole.choices[0].logprobs.content

            tokens: Tokens = []
            killed: list[str] = []
            stream = await house.whole(stream=True, logprobs=True, **asked)
            async for chunk in stream:
                for choice in chunk.choices:
                    tokens += (choice.logprobs.content or []) if choice.logprobs else []
                if len(tokens) > 20 * (len(killed) + 1) and len(killed) < 2:
                    killed.append(await node_of(house, chunk.id.removeprefix("chatcmpl-")))
                    house.workers[killed[-1]].kill_child()

    assert len(killed) == 2
    assert tokens == expected


async def node_of(house: House, job: str) -> str:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {house.key}"}) as http,
        http.get(f"{house.bases[0]}/v1/jobs/{job}") as got,
    ):
        return str((await got.json())["node"])
