"""Ask a node that somebody else runs: is it well, and what does it serve? Bounded in time, size and place.

The session comes from `bus.address_guard`, so only permitted addresses are ever dialled; redirects are not followed.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from bus.address_guard import AddressRefused
from bus.ids import ModelName, is_model_name
from gateway.errors import ApiError

ANSWER_BYTES_MAX: Final = 256 * 1024
MODELS_MAX: Final = 64  # of one node; the registration event holds no more
# Ollama and some small servers have no /health, but answer for their models.
NO_HEALTH_ROUTE: Final = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class NodeProbe:
    """timeout_s bounds each question as a whole."""

    def __init__(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s

    async def check_health(self, api_url: str) -> None:
        """Raises ApiError `node_unhealthy` or `address_not_allowed`, with what was seen."""
        answer = await self._get(api_url + "/health")
        if answer.status in NO_HEALTH_ROUTE:
            answer = await self._get(api_url + "/v1/models")
        if not 200 <= answer.status < 300:
            raise ApiError("node_unhealthy", f"{api_url}/health answered {answer.status}", param="api_url")

    async def ask_models(self, api_url: str) -> tuple[ModelName, ...]:
        """What the node lists at /v1/models; empty if it lists nothing that can be read."""
        try:
            answer = await self._get(api_url + "/v1/models")
        except ApiError:
            return ()
        return parse_models(answer.body) if answer.status == 200 else ()

    async def _get(self, url: str) -> Answer:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.get(url, allow_redirects=False) as response,
            ):
                return Answer(response.status, await _read_at_most(response, url))
        except AddressRefused as error:
            raise ApiError("address_not_allowed", f"api_url is not allowed: {error}", param="api_url") from error
        except TimeoutError:
            message = f"{url} did not answer within {self._timeout_s:g} s"
            raise ApiError("node_unhealthy", message, param="api_url") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError("node_unhealthy", f"{url} cannot be reached: {_short(error)}", param="api_url") from error


async def _read_at_most(response: aiohttp.ClientResponse, url: str) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(16 * 1024):
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise ApiError("node_unhealthy", f"{url} answered more than {ANSWER_BYTES_MAX} bytes", param="api_url")
    return bytes(body)


def parse_models(body: bytes) -> tuple[ModelName, ...]:
    """The names in `{"data": [{"id": ...}]}` that can be ours, each once, in order."""
    try:
        listed: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ()
    data = listed.get("data") if isinstance(listed, dict) else None
    ids = [item.get("id") for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    names = dict.fromkeys(ModelName(name) for name in ids if isinstance(name, str) and is_model_name(name))
    return tuple(names)[:MODELS_MAX]


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
