"""Whatever a client sends, it gets JSON and no 500, and the gateway serves the next one."""

import copy
import random
from typing import Any

import orjson
import pytest

from tests.gateway.conftest import MODEL, Served

SEED = 20261123
ROUNDS = 150
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, 2**63, -(2**64), "", " ", "\x00", "a\x00b", "😀", "x" * 5_000, "\u2028",
    "../..", [], [None], [[]], {}, {"a": {}}, [{}] * 50, {"type": "text"}, "null", "-1", "1e5",
]  # fmt: skip
VALID: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["x"],
        "temperature": 1,
        "top_p": 1,
        "seed": 1,
        "max_tokens": 5,
        "n": 1,
        "logprobs": None,
        "tools": [],
        "response_format": {"type": "text"},
    },
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 5, "stop": None},
    "/api/chat/gpu": {"prompt": "hi", "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 5},
    "/api/gpu/register": {
        "node_id": "n",
        "api_url": "http://127.0.0.1:1",
        "capabilities": {"gpu_memory_gb": 24, "layers": [0], "model": "m", "max_concurrency": 1},
    },
    "/api/gpu/heartbeat": {"node_id": "n"},
}


def mutated(value: Any, chance: random.Random) -> Any:
    """The same value with one to three of its parts replaced by strange ones or left out."""
    whole = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        at = whole
        while isinstance(at, dict | list) and at:
            key = chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or chance.random() < 0.4:
                at[key] = chance.choice(STRANGE)
                break
            at = inner
    return whole


@pytest.mark.parametrize("path", sorted(VALID))
async def test_no_body_makes_a_500(served: Served, path: str) -> None:
    chance = random.Random(SEED)
    for turn in range(ROUNDS):
        body = mutated(VALID[path], chance)
        try:
            raw = orjson.dumps(body)
        except TypeError:  # a number beyond 64 bits: no such JSON from this encoder
            continue
        if turn % 5 == 0:
            at = chance.randrange(len(raw))
            raw = raw[:at] + bytes([chance.randrange(256)]) + raw[at + chance.randint(0, 3) :]

        status, headers, answer = await served.call("POST", path, raw=raw)

        assert status in (400, 403, 404, 422, 429, 503), (SEED, turn, raw, status, answer)
        assert headers["Content-Type"].startswith("application/json")
        assert isinstance(answer["error"], dict)
        assert answer["error"]["message"]
