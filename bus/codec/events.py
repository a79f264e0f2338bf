"""What happens to nodes, as entries of the `nodes` stream.

An entry is flat: type, v, node, epoch, data; `data` is msgpack of the event, so a new field needs only a default.
Order is (epoch, stream entry id). A worker's beat is full state and recreates its node; an HTTP node's beat carries
only its id and creates nothing.
"""

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from bus.codec.fields import COUNT_MAX, MOMENT_MAX, is_capability, is_digest, is_holder, is_out
from bus.ids import Holder, NodeId, is_model_name, is_node_id

EVENT_VERSION = 1
EPOCH_LEAD_MS = 30 * 86_400_000  # an epoch is a server's time; one further ahead of its entry would shut the node's
# next owners out, because theirs must be greater. Generous: a clock that went back must not.
LAYERS_MAX = 65_536
CAPABILITIES_MAX = 16
TEXT_MAX = 2_048  # characters of an address, an id, a version


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
    drafted: int = 0  # tokens guessed by speculation since the worker started ...
    accepted: int = 0  # ... and those of them that the model agreed with
    loop_lag_ms: float = 0.0  # how late the worker's event loop is: 99th percentile of the last seconds ...
    loop_lag_max_ms: float = 0.0  # ... and the longest
    gpu_memory_gb: float = 0.0
    version: str = ""
    draining: bool = False
    can: tuple[str, ...] | None = None  # of `bus.jobs.Capability`, or a later release's; None: it does not say


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
    can: tuple[str, ...] | None = None  # as in a beat; None: found out by asking


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


def parse_event(fields: Mapping[str, bytes], entry_id: str = "") -> NodeEvent:
    """Raises ForeignEntry with the reason. entry_id: of the entry, to hold its epoch against."""
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
    if not isinstance(event, HttpBeat):
        _check_epoch(event.epoch, entry_id)
    if isinstance(event, NodeBeat | NodeRegistered):
        _check_capabilities(event)
    if isinstance(event, NodeBeat):
        _check_beat(event)
    elif isinstance(event, NodeRegistered):
        _check_registration(event)
    return event


def _check_epoch(epoch: int, entry_id: str) -> None:
    moment = int(entry_id.partition("-")[0] or 0)
    if not 0 < epoch < MOMENT_MAX:
        raise ForeignEntry("the epoch must be 1..10^14-1")
    if moment and epoch > moment + EPOCH_LEAD_MS:
        raise ForeignEntry("the epoch is far ahead of the server's time")


def _check_capabilities(event: NodeBeat | NodeRegistered) -> None:
    if not event.models or len(event.models) > 64 or not all(is_model_name(model) for model in event.models):
        raise ForeignEntry("models must be 1..64 names of [A-Za-z0-9_./@+:-]{1,128}")
    if not 1 <= event.capacity <= 65536:
        raise ForeignEntry("capacity must be 1..65536")
    layers = event.layers or ()
    if len(layers) > 4096 or any(not 0 <= layer < LAYERS_MAX for layer in layers):
        raise ForeignEntry("layers must be at most 4096 numbers of 0..65535")
    if not 0 <= event.layer_count <= LAYERS_MAX:
        raise ForeignEntry("layer_count must be 0..65536")
    if len(event.can or ()) > CAPABILITIES_MAX or not all(map(is_capability, event.can or ())):
        raise ForeignEntry(f"can must be at most {CAPABILITIES_MAX} names of [a-z0-9_]{{1,32}}")
    _check_counts(context_length=event.context_length)
    _check_figures(gpu_memory_gb=event.gpu_memory_gb)


def _check_beat(event: NodeBeat) -> None:
    if not is_holder(event.holder):
        raise ForeignEntry("the holder is not [A-Za-z0-9_.:-]{1,160}")
    if not is_digest(event.resume):
        raise ForeignEntry("resume must be at most 160 printable characters without blanks")
    _check_counts(
        running=event.running, waiting=event.waiting, free_blocks=event.free_blocks, total_blocks=event.total_blocks
    )
    _check_figures(
        prefill_rate=event.prefill_rate,
        decode_rate=event.decode_rate,
        loop_lag_ms=event.loop_lag_ms,
        loop_lag_max_ms=event.loop_lag_max_ms,
    )
    if not 0 <= event.accepted <= event.drafted <= MOMENT_MAX:  # they only grow, for as long as the worker lives
        raise ForeignEntry(f"accepted and drafted must be 0..{MOMENT_MAX}, accepted no more than drafted")
    _check_lengths(version=event.version)


def _check_registration(event: NodeRegistered) -> None:
    if event.answer_to and not is_out(event.answer_to):
        raise ForeignEntry("answer_to names no out-stream")
    _check_lengths(key_id=event.key_id, api_url=event.api_url, answer_id=event.answer_id)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not 0 <= value <= COUNT_MAX:
            raise ForeignEntry(f"{name} must be 0..{COUNT_MAX}")


def _check_figures(**figures: float) -> None:
    for name, value in figures.items():
        if not (math.isfinite(value) and 0 <= value <= COUNT_MAX):
            raise ForeignEntry(f"{name} must be a number of 0..{COUNT_MAX}")


def _check_lengths(**texts: str) -> None:
    for name, value in texts.items():
        if len(value) > TEXT_MAX:
            raise ForeignEntry(f"{name} is longer than {TEXT_MAX} characters")
