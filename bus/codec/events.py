"""What happens to nodes, as entries of the `nodes` stream.

An entry is flat: type, v, node, epoch, data; `data` is msgpack of the event, so a new field needs only a default.
Order is (epoch, stream entry id). A worker's beat is full state and recreates its node; an HTTP node's beat carries
only its id and creates nothing.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from bus.ids import Holder, NodeId, is_model_name, is_node_id

EVENT_VERSION = 1


class ForeignEntry(Exception):
    """A stream entry that is not ours: missing or foreign fields, or an unknown version. Goes to the dead letters."""


class NodeBeat(msgspec.Struct, frozen=True, omit_defaults=True, tag="beat"):
    """Full state of a node whose worker dials out (torch, echo). The first beat registers it."""

    node: NodeId
    epoch: int
    holder: Holder  # "<worker>.<epoch>"
    kind: Literal["torch", "echo"]
    models: tuple[str, ...]
    capacity: int  # sequences at once
    whole: bool = True  # serves whole prompts; False: holds only `layers` of the model
    layers: tuple[int, ...] = ()
    layer_count: int = 0  # of the whole model; 0 = unknown
    context_length: int = 0
    resume: str = ""  # digest of tokenizer and weights; "" = token ids are of no use to others
    prefill_rate: float = 0.0  # tokens per second, measured
    decode_rate: float = 0.0
    running: int = 0  # as the engine sees it; the truth for dispatch is ZCARD(running)
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    gpu_memory_gb: float = 0.0
    version: str = ""
    draining: bool = False


class NodeRegistered(msgspec.Struct, frozen=True, omit_defaults=True, tag="register"):
    """A node that speaks HTTP, registered by a gateway under the node's lock; the epoch is the lock's fencing token."""

    node: NodeId
    epoch: int
    key_id: str  # who may beat for it and register it again
    api_url: str
    models: tuple[str, ...]
    capacity: int = 4
    layers: tuple[int, ...] | None = None  # None: the registry gives it the least covered range
    layer_count: int = 0
    context_length: int = 0
    gpu_memory_gb: float = 0.0
    api: Literal["", "openai", "simple"] = ""  # "" = the relay finds out
    answer_to: str = ""  # out-stream "gateway:<id>" that waits for `type=reply`
    answer_id: str = ""


class HttpBeat(msgspec.Struct, frozen=True, omit_defaults=True, tag="http_beat"):
    node: NodeId
    key_id: str = ""


class NodeDrain(msgspec.Struct, frozen=True, omit_defaults=True, tag="drain"):
    """Takes no more work; finishes or hands back what it holds."""

    node: NodeId
    epoch: int


class NodeBye(msgspec.Struct, frozen=True, omit_defaults=True, tag="bye"):
    """Left on purpose: no longer counted; a tombstone keeps late beats of this epoch from reviving it."""

    node: NodeId
    epoch: int
    key_id: str = ""


NodeEvent = NodeBeat | NodeRegistered | HttpBeat | NodeDrain | NodeBye

_TYPES: dict[type, str] = {
    NodeBeat: "beat",
    NodeRegistered: "register",
    HttpBeat: "http_beat",
    NodeDrain: "drain",
    NodeBye: "bye",
}
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(NodeEvent)


def event_fields(event: NodeEvent) -> list[str | bytes]:
    """The flat fields of the event's entry, in their fixed order, ready for XADD."""
    epoch = 0 if isinstance(event, HttpBeat) else event.epoch
    data = _encoder.encode(event)
    return ["type", _TYPES[type(event)], "v", str(EVENT_VERSION), "node", event.node, "epoch", str(epoch), "data", data]


def parse_event(fields: Mapping[str, bytes]) -> NodeEvent:
    """Raises ForeignEntry with the reason."""
    try:
        version = fields["v"]
        data = fields["data"]
        kind = fields["type"].decode("ascii", "replace")
    except KeyError as missing:
        raise ForeignEntry(f"field {missing} is missing") from missing
    if version != str(EVENT_VERSION).encode():
        raise ForeignEntry(f"version {version[:20]!r} is unknown; this release speaks {EVENT_VERSION}")
    if kind not in _TYPES.values():
        raise ForeignEntry(f"type {kind[:40]!r} is unknown")
    try:
        event: NodeEvent = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ForeignEntry(f"data does not parse: {error}") from error
    if _TYPES[type(event)] != kind:
        raise ForeignEntry(f"type says {kind}, data holds {_TYPES[type(event)]}")
    if not is_node_id(event.node):
        raise ForeignEntry("the node id is not [A-Za-z0-9_.-]{1,64}")
    if isinstance(event, NodeBeat | NodeRegistered):
        _check_capabilities(event)
    return event


def _check_capabilities(event: NodeBeat | NodeRegistered) -> None:
    if not event.models or len(event.models) > 64 or not all(is_model_name(model) for model in event.models):
        raise ForeignEntry("models must be 1..64 names of [A-Za-z0-9_./@+:-]{1,128}")
    if not 1 <= event.capacity <= 65536:
        raise ForeignEntry("capacity must be 1..65536")
    layers = event.layers or ()
    if len(layers) > 4096 or any(not 0 <= layer < 65536 for layer in layers):
        raise ForeignEntry("layers must be at most 4096 numbers of 0..65535")
    if not 0 < event.epoch < 2**53:
        raise ForeignEntry("the epoch must be 1..2^53-1")
