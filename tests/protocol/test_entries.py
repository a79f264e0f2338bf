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
        {"epoch": 10**14},
        {"prefill_rate": float("nan")},
        {"gpu_memory_gb": float("inf")},
        {"layer_count": 65_537},
        {"context_length": -1},
        {"holder": Holder("a b")},
        {"version": "x" * 5_000},
    ],
)
def test_a_beat_with_impossible_values_is_foreign(change: dict[str, Any]):
    with pytest.raises(ForeignEntry):
        parse_event(to_fields(msgspec.structs.replace(BEAT, **change)))


def test_an_epoch_far_ahead_of_its_entry_is_foreign():
    """The node's next owners would need a greater one, and could not have it."""
    ahead = NodeBye(NodeId("n"), 1_700_000_000_000 + 40 * 86_400_000)

    assert parse_event(to_fields(ahead), f"{ahead.epoch}-0") == ahead
    with pytest.raises(ForeignEntry, match="far ahead"):
        parse_event(to_fields(ahead), "1700000000000-0")


QUEUED = {
    "job": b"c0-j", "fence": b"1.ab", "out": b"gateway:g", "est_prompt": b"1", "est_new": b"1", "deadline": b"1",
    "alone": b"", "avoided": b"n1 n2", "resume": b"", "refused": b"n2",
}  # fmt: skip
END = {
    "type": b"end", "job": b"c0-j", "fence": b"1.ab", "state": b"done", "reason": b"stop", "text_len": b"1",
    "prompt_tokens": b"1", "new_tokens": b"1", "node": b"n", "error_code": b"", "error_message": b"",
    "retry_after_ms": b"0", "text": b"x",
}  # fmt: skip
MARKER = {
    "type": b"marker", "job": b"c0-j", "fence": b"1.ab", "node": b"n", "text_len": b"0", "token_len": b"0",
}  # fmt: skip
FRAME = {"type": b"frame", "job": b"c0-j", "fence": b"1.ab", "offset": b"0", "text": b"x", "count": b"1"}
ASSIGNMENT = {
    "job": b"c0-j", "fence": b"1.ab", "owner": b"w.1", "route": b"gateway:g g  ",
    "spec": b"m s keep -1 1 2 3 4", "text_len": b"0", "token_len": b"0", "payload": b"",
}  # fmt: skip
WAKE = {
    "queue": b"m:1", "job": b"c0-j", "entry": b"1-1", "fence": b"0.0", "out": b"reply:r", "est_prompt": b"1",
    "est_new": b"1", "deadline": b"1",
}  # fmt: skip
CANCEL = {"type": b"cancel", "job": b"c0-j", "fence": b"1.ab"}
OURS: list[tuple[Callable[[Any], Any], dict[str, bytes]]] = [
    (lambda fields: parse_queued("1-1", fields), QUEUED),
    (lambda fields: parse_assignment("1-1", fields), ASSIGNMENT),
    *((parse_out, fields) for fields in (END, MARKER, FRAME)),
    (parse_wake, WAKE),
    (parse_control, CANCEL),
]
ABSURD: dict[str, list[bytes]] = {
    "job": [b"", b"x", b"c0-a b", b"c0-" + b"x" * 200, b"\xff"],
    "fence": [b"", b"x", b"abc", b"1", b"1.", b".a", b"-1.a", b"1.A", b"1.a b", b"9" * 10 + b".a", b"1." + b"a" * 40],
    "out": [b"", b"x", b"gateway:", b"jobs", b"gateway:a b"],
    "route": [b"", b"jobs", b" gateway:g"],
    "owner": [b"", b"a b", b"\xff", b"x" * 200],
    "entry": [b"zzz", b"1", b"1-", b"-1", b"1-1-1", b"9" * 30 + b"-1"],
    "queue": [b"junk", b"m:7", b":1", b"m:01", b"a b:1", b"\xff"],
    "avoided": [b"a b!", b"x" * 65], "refused": [b"a b!"],
    "resume": [b"a b", b"x" * 200],
    "state": [b"", b"queued", b"exploded"],
    "spec": [b"", b"m s keep 1 1 2 3", b"m s keep 1 1 2 -3 4", b"m s keep 1 1 2 3 9999999999",
             b"m s keep 1 1 " + b"9" * 300 + b" 3 4"],
    "text": [], "payload": [], "alone": [], "error_message": [], "type": [b"", b"explode"],
    **{name: [b"x" * 300] for name in ("reason", "node", "error_code")},
    **{name: [b"", b"x", b"-1", b"1.5", b"nan", b"9" * 20, b"9" * 400, b"9" * 5_000]
       for name in ("est_prompt", "est_new", "deadline", "text_len", "token_len", "prompt_tokens", "new_tokens",
                    "retry_after_ms", "offset", "count")},
}  # fmt: skip


@pytest.mark.parametrize(("parse", "fields"), OURS)
def test_one_absurd_field_makes_an_entry_foreign(parse: Callable[[Any], Any], fields: dict[str, bytes]):
    """What comes through is used without another look: in arithmetic, as part of a key, as an argument of a script."""
    parse(fields)

    came_through = [
        (name, absurd[:60])
        for name in fields
        for absurd in ABSURD[name]
        if not is_foreign(parse, fields | {name: absurd})
    ]
    assert came_through == []


def is_foreign(parse: Callable[[Any], Any], fields: dict[str, bytes]) -> bool:
    try:
        parse(fields)
    except ForeignEntry:
        return True
    return False


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
