"""The body of POST /api/gpu/register and of a heartbeat, parsed to values. Pure.

`api_url` is kept as the base address: no trailing slash and no `/v1`, which owners copy from OpenAI clients.
Whether the address may be called at all is for `bus.address_guard`.
"""

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from bus.chat_request import kind_of
from bus.ids import ModelName, NodeId, is_model_name, is_node_id
from bus.jobs import CAPABILITIES
from gateway.errors import ApiError
from gateway.fields import Fields, invalid, missing

API_URL_LENGTH_MAX: Final = 2048
LAYER_MAX: Final = 9_999
LAYERS_MAX: Final = 1_024
GPU_MEMORY_GB_MAX: Final = 1_000_000.0
CONCURRENCY_MAX: Final = 4_096
CONCURRENCY_DEFAULT: Final = 4
NODE_ID_RULE: Final = "be 1 to 64 of the characters A-Z a-z 0-9 _ . -"


@dataclass(frozen=True, slots=True)
class Registration:
    """A node as its owner describes it. model None: ask the node. layers None: the registry assigns them. can None: he
    does not say what it can do of what not every node can."""

    node_id: NodeId
    api_url: str
    gpu_memory_gb: float
    layers: tuple[int, ...] | None
    model: ModelName | None
    max_concurrency: int
    can: tuple[str, ...] | None = None


def parse_registration(body: dict[str, Any]) -> Registration:
    """Raises ApiError 400 with the field's name."""
    fields = Fields(body)
    node_id = parse_node_id(body.get("node_id"))
    api_url = parse_api_url(fields)
    capabilities = fields.object("capabilities")
    if capabilities is None:
        raise missing("capabilities")
    memory = capabilities.number("gpu_memory_gb", 0, GPU_MEMORY_GB_MAX)
    if memory is None:
        raise missing("capabilities.gpu_memory_gb")
    model = capabilities.text("model", longest=128)
    if model is not None and not is_model_name(model):
        raise invalid("capabilities.model", "be 1 to 128 of the characters A-Z a-z 0-9 _ . / @ + : -")
    return Registration(
        node_id=node_id,
        api_url=api_url,
        gpu_memory_gb=memory,
        layers=capabilities.integers("layers", 0, LAYER_MAX, most=LAYERS_MAX),
        model=ModelName(model) if model is not None else None,
        max_concurrency=capabilities.integer("max_concurrency", 1, CONCURRENCY_MAX) or CONCURRENCY_DEFAULT,
        can=capabilities.words("can", CAPABILITIES),
    )


def parse_node_id(value: Any) -> NodeId:
    if value is None:
        raise missing("node_id")
    if not isinstance(value, str):
        raise invalid("node_id", "be a string", value)
    if not is_node_id(value):
        raise invalid("node_id", NODE_ID_RULE, value)
    return NodeId(value)


def parse_heartbeat(body: Any) -> NodeId:
    """A heartbeat is `"node-id"` or `{"node_id": "..."}`."""
    if isinstance(body, str):
        return parse_node_id(body)
    if isinstance(body, dict):
        return parse_node_id(body.get("node_id"))
    raise ApiError(
        "invalid_request",
        f"the request body must be a node id or an object with `node_id`, not {kind_of(body)}",
        param="node_id",
    )


def parse_api_url(fields: Fields) -> str:
    text = fields.text("api_url", longest=API_URL_LENGTH_MAX)
    if text is None:
        raise missing("api_url")
    if any(ord(char) <= 0x20 or ord(char) == 0x7F for char in text):
        raise invalid("api_url", "not contain spaces or control characters")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise invalid("api_url", f"be a URL ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise invalid("api_url", "be an http:// or https:// address with a host", text)
    if parts.username is not None or parts.password is not None:
        raise invalid("api_url", "not contain a user or password")
    if parts.query or parts.fragment:
        raise invalid("api_url", "not have a query or fragment")
    base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return base.removesuffix("/v1")
