"""How a node event becomes the call of its apply script: which keys it writes, and the fields of the node's hash."""

from collections.abc import Sequence

import orjson

from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeEvent, NodeRegistered
from bus.keys import CellKeys
from bus.settings import Settings

Words = list[str | bytes | int]
NOTHING = "-"

_SCRIPTS: dict[type, str] = {
    NodeBeat: "apply_beat",
    NodeRegistered: "apply_register",
    HttpBeat: "apply_http_beat",
    NodeDrain: "apply_drain",
    NodeBye: "apply_bye",
}


def apply_script(event: NodeEvent) -> str:
    return _SCRIPTS[type(event)]


def model_keys(keys: CellKeys, event: NodeEvent, known_models: Sequence[str]) -> list[str]:
    """The keys that follow the five common ones. `known_models` are those in the node's hash; the zsets of what the
    node serves come first, then those that it must leave."""
    match event:
        case NodeBeat():
            served, other = (keys.model, keys.model_parts) if event.whole else (keys.model_parts, keys.model)
            return [*map(served, event.models), *map(other, event.models), *_gone(keys, event.models, known_models)]
        case NodeRegistered():
            answer = keys.out(event.answer_to) if event.answer_to else keys.node(event.node)
            served_keys = [*map(keys.model, event.models), *map(keys.model_parts, event.models)]
            return [keys.leases, answer, *served_keys, *_gone(keys, event.models, known_models)]
        case HttpBeat():
            return [keys.model(model) for model in known_models]
        case NodeBye():
            each = (keys.model, keys.model_parts, keys.left)
            return [keys.node_running(event.node), *(key(model) for model in known_models for key in each)]
        case NodeDrain():
            return []


def _gone(keys: CellKeys, models: Sequence[str], known_models: Sequence[str]) -> list[str]:
    left = [model for model in known_models if model not in models]
    return [key for model in left for key in (keys.model(model), keys.model_parts(model))]


def apply_args(entry_id: str, event: NodeEvent, settings: Settings) -> Words:
    ms, _, sequence = entry_id.partition("-")
    common: Words = [event.node, ms, sequence or "0", settings.node_ttl_ms, settings.node_keep_ms]
    match event:
        case NodeBeat():
            draining = "1" if event.draining else ""
            return [*common, event.epoch, event.holder, draining, len(event.models), *beat_fields(event)]
        case NodeRegistered():
            detail = orjson.dumps({"layers": list(event.layers or ())})
            answer_id = event.answer_id if event.answer_to else ""
            head: Words = [event.epoch, event.key_id, answer_id, detail, settings.out_ttl_ms, len(event.models)]
            return [*common, *head, *registered_fields(event)]
        case HttpBeat():
            return [*common, event.key_id]
        case NodeDrain():
            return [*common, event.epoch]
        case NodeBye():
            return [*common, event.epoch, event.key_id]


def beat_fields(event: NodeBeat) -> Words:
    """Fields and values of the node's hash, in pairs."""
    return [
        *("kind", event.kind, "models", " ".join(event.models), "capacity", event.capacity),
        *("whole", "1" if event.whole else "0", "layers", _join(event.layers), "layer_count", event.layer_count),
        *("context_length", event.context_length, "resume", event.resume),
        *("prefill_rate", f"{event.prefill_rate:.3f}", "decode_rate", f"{event.decode_rate:.3f}"),
        *("reported_running", event.running, "waiting", event.waiting),
        *("free_blocks", event.free_blocks, "total_blocks", event.total_blocks),
        *("drafted", event.drafted, "accepted", event.accepted),
        *("loop_lag_ms", f"{event.loop_lag_ms:.1f}", "loop_lag_max_ms", f"{event.loop_lag_max_ms:.1f}"),
        *("gpu_memory_gb", f"{event.gpu_memory_gb:g}", "version", event.version, "api_url", ""),
        *("can", _words(event.can)),
    ]


def registered_fields(event: NodeRegistered) -> Words:
    return [
        *("models", " ".join(event.models), "capacity", event.capacity, "whole", "1"),
        *("layers", _join(event.layers or ()), "layer_count", event.layer_count),
        *("context_length", event.context_length, "resume", "", "api_url", event.api_url, "api", event.api),
        *("gpu_memory_gb", f"{event.gpu_memory_gb:g}", "can", _words(event.can)),
    ]


def _words(can: Sequence[str] | None) -> str:
    """A hyphen for nothing; empty: it does not say. `parse_can` reads it."""
    return "" if can is None else " ".join(can) or NOTHING


def parse_can(text: str) -> tuple[str, ...] | None:
    return tuple(word for word in text.split() if word != NOTHING) if text else None


def _join(layers: Sequence[int]) -> str:
    return " ".join(str(layer) for layer in layers)
