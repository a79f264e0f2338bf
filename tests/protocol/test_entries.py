"""Entries of streams: ours parse to values, everything else is a ForeignEntry with the reason, never another error."""

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.codec.entries import parse_assignment, parse_control, parse_out, parse_queued, parse_wake
from bus.codec.events import (
    EVENT_VERSION,
    ForeignEntry,
    HttpBeat,
    NodeBeat,
    NodeBye,
    NodeEvent,
    NodeRegistered,
    event_fields,
    parse_event,
)
from bus.codec.wire import Route, pack_tokens, parse_route, unpack_tokens
from bus.ids import Holder, ModelName, NodeId

PARSERS: list[Callable[[Any], Any]] = [
    parse_out,
    lambda fields: parse_assignment("1-1", fields),
    parse_control,
    parse_wake,
    lambda fields: parse_queued("1-1", fields),
    parse_event,
]
NAMES = st.sampled_from(
    ["type", "v", "job", "fence", "route", "spec", "data", "queue", "text_len", "offset", "text", "count", "out"]
)
BEAT = NodeBeat(NodeId("n"), 3, Holder("n.3"), "torch", (ModelName("m"),), capacity=2)


def to_fields(event: NodeEvent, **changes: bytes) -> dict[str, bytes]:
    flat = [word.encode() if isinstance(word, str) else word for word in event_fields(event)]
    fields = {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}
    return fields | changes


@pytest.mark.parametrize("parse", PARSERS)
@given(fields=st.dictionaries(NAMES, st.binary(max_size=20) | st.sampled_from([b"frame", b"end", b"1", b"beat"])))
def test_foreign_fields_are_never_another_error(parse: Callable[[Any], Any], fields: dict[str, bytes]):
    with contextlib.suppress(ForeignEntry):
        parse(fields)


@pytest.mark.parametrize(
    "event",
    [
        BEAT,
        NodeRegistered(NodeId("h"), 4, "k", "http://x", (ModelName("m"),), layers=(0, 3)),
        HttpBeat(NodeId("h"), "k"),
        NodeBye(NodeId("n"), 3),
    ],
)
def test_node_events_survive_their_stream(event: NodeEvent):
    assert parse_event(to_fields(event)) == event


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v": b"2"}, "version"),
        ({"type": b"explode"}, "unknown"),
        ({"type": b"bye"}, "data holds beat"),
        ({"data": b"\xc1\x00"}, "does not parse"),
        ({"data": msgspec.msgpack.encode({"type": "beat", "node": "n"})}, "does not parse"),
    ],
)
def test_a_foreign_node_event_says_what_is_wrong(changes: dict[str, bytes], reason: str):
    with pytest.raises(ForeignEntry, match=reason):
        parse_event(to_fields(BEAT, **changes))


@pytest.mark.parametrize(
    "change",
    [
        {"node": "a b"},
        {"node": "x" * 65},
        {"models": ()},
        {"models": ("a b",)},
        {"capacity": 0},
        {"layers": (-1,)},
        {"epoch": 0},
        {"epoch": 2**60},
    ],
)
def test_a_beat_with_impossible_values_is_foreign(change: dict[str, Any]):
    with pytest.raises(ForeignEntry):
        parse_event(to_fields(msgspec.structs.replace(BEAT, **change)))


def test_a_later_release_may_add_fields_to_an_event():
    data = msgspec.msgpack.encode(msgspec.to_builtins(BEAT) | {"invented_later": 7})

    assert parse_event(to_fields(BEAT, data=data)) == BEAT
    assert EVENT_VERSION == 1


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.text(st.characters(codec="utf-8"), max_size=20))
def test_routes_survive_any_address(address: str, key_id: str):
    route = Route("gateway:g", "g", address, key_id)  # type: ignore[arg-type]

    assert parse_route(route.encode()) == route
    assert route.encode().count(" ") in (0, 3)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_survive_their_packing(tokens: list[int]):
    assert unpack_tokens(pack_tokens(tokens)) == tuple(tokens)
