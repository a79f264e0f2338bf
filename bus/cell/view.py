"""How a node's view travels from `_view.lua`: names and types of its fields, in the script's order."""

import math
from typing import Any, cast

from bus.codec.node_events import parse_can
from bus.codec.wire import NODE_STATES, NodeState, NodeView
from bus.ids import NodeId

SHORT_FIELDS = (
    *("owner", "state", "kind", "models", "capacity", "prefill_rate", "decode_rate", "failure", "breaker_n"),
    *("breaker_until", "alone", "alone_until", "beat_ms", "resume", "context_length", "can", "cannot", "breaker_probe"),
)
FULL_FIELDS = (
    *("epoch", "layers", "layer_count", "whole", "ok", "failed", "client_errors", "api_url", "api"),
    *("key_id", "gpu_memory_gb", "version", "waiting", "free_blocks", "total_blocks", "drafted", "accepted"),
    *("loop_lag_ms", "loop_lag_max_ms"),
)
_NAMES = SHORT_FIELDS + FULL_FIELDS
LAYER_DIGITS_MAX = 5


def to_node_view(raw: list[Any]) -> NodeView:
    """raw: id, alive, leased, running, promised prompt and new tokens, then the fields as texts."""
    values = {name: value.decode("utf-8", "replace") for name, value in zip(_NAMES, raw[6:], strict=False)}

    def real(name: str) -> float:
        """0 for what is no number: a foreign hash must not stop everybody who looks at all nodes."""
        try:
            number = float(values.get(name) or 0)
        except ValueError:
            return 0.0
        return number if math.isfinite(number) else 0.0

    def whole(name: str) -> int:
        return int(real(name))

    running = int(raw[3])
    return NodeView(
        node=NodeId(raw[0].decode("utf-8", "replace")),
        state=cast(NodeState, values["state"] if values["state"] in NODE_STATES else "starting"),
        alive=raw[1] == 1,
        leased=raw[2] == 1,
        owner=values["owner"],
        kind=values["kind"],
        models=tuple(values["models"].split()),
        capacity=whole("capacity"),
        running=running,
        promised_prompt=int(raw[4]),
        promised_new=int(raw[5]),
        prefill_rate=real("prefill_rate"),
        decode_rate=real("decode_rate"),
        failure=real("failure"),
        breaker_n=whole("breaker_n"),
        breaker_until_ms=whole("breaker_until"),
        alone=values["alone"],
        alone_until_ms=whole("alone_until"),
        last_beat_ms=whole("beat_ms"),
        resume=values["resume"],
        epoch=whole("epoch"),
        layers=tuple(int(layer) for layer in values.get("layers", "").split() if _is_layer(layer)),
        layer_count=whole("layer_count"),
        whole=values.get("whole", "1") != "0",
        context_length=whole("context_length"),
        ok=whole("ok"),
        failed=whole("failed"),
        client_errors=whole("client_errors"),
        api_url=values.get("api_url", ""),
        api=values.get("api", ""),
        key_id=values.get("key_id", ""),
        gpu_memory_gb=real("gpu_memory_gb"),
        version=values.get("version", ""),
        waiting=whole("waiting"),
        free_blocks=whole("free_blocks"),
        total_blocks=whole("total_blocks"),
        drafted=whole("drafted"),
        accepted=whole("accepted"),
        loop_lag_ms=real("loop_lag_ms"),
        loop_lag_max_ms=real("loop_lag_max_ms"),
        breaker_probe=values.get("breaker_probe", ""),
        can=parse_can(values["can"]),
        cannot=tuple(values["cannot"].split()),
    )


def _is_layer(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= LAYER_DIGITS_MAX
