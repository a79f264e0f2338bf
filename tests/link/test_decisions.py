"""The link's pure rules: backoff, refusals, slot owners, parsing replies, fitness of a server."""

import random

import pytest

from bus.link import Endpoint, ServerAddress, to_batch, to_entry
from bus.link.backoff import backoff_s
from bus.link.check import find_problem, parse_version
from bus.link.dial import masters_of, owner_of, parse_info, to_client_name
from bus.link.errors import to_server_error
from bus.link.refusal import Asking, Elsewhere, Later, Refusal, Unknown, parse_refusal

ASKED = Endpoint("10.0.0.7", 7000)


def test_backoff_doubles_up_to_two_seconds_and_is_spread_over_the_whole_range() -> None:
    assert [backoff_s(n, lambda: 1.0) for n in (0, 1, 2, 5, 6, 50)] == [0.05, 0.1, 0.2, 1.6, 2.0, 2.0]
    assert backoff_s(3, lambda: 0.5) == pytest.approx(0.2)


def test_backoff_is_never_a_hot_loop() -> None:
    seed = 20261123
    rng = random.Random(seed)
    assert min(backoff_s(n % 20, rng.random) for n in range(10_000)) >= 0.01, f"seed {seed}"
    assert backoff_s(0, lambda: 0.0) > 0


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        ("NOSCRIPT No matching script.", Unknown()),
        ("MOVED 3999 127.0.0.1:6381", Elsewhere(Endpoint("127.0.0.1", 6381))),
        ("MOVED 3999 :6381", Elsewhere(Endpoint("10.0.0.7", 6381))),
        ("MOVED 3999 [::1]:6381", Elsewhere(Endpoint("::1", 6381))),
        ("ASK 3999 127.0.0.1:6381", Asking(Endpoint("127.0.0.1", 6381))),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Later()),
        ("READONLY You can't write against a read only replica.", Elsewhere(None)),
        ("LOADING Redis is loading the dataset in memory", Elsewhere(None)),
        ("CLUSTERDOWN The cluster is down", Elsewhere(None)),
    ],
)
def test_errors_that_mean_not_executed_are_refusals(error: str, refusal: Refusal) -> None:
    assert parse_refusal(error, ASKED) == refusal


@pytest.mark.parametrize(
    "error", ["WRONGTYPE Operation", "OOM command not allowed", "ERR MOVED by me", "NOPERM no", "MOVED"]
)
def test_all_other_errors_are_the_answer(error: str) -> None:
    assert parse_refusal(error, ASKED) is None


def test_an_error_has_the_servers_code_and_text() -> None:
    error = to_server_error("WRONGTYPE Operation against a key")
    assert (error.code, error.message) == ("WRONGTYPE", "Operation against a key")


def test_the_owner_of_a_slot_is_the_first_node_of_its_range() -> None:
    slots = [[0, 8191, [b"a", 1, b"id"], [b"replica", 9, b"id"]], [8192, 16383, [b"", 2, b"id"]]]

    assert owner_of(8191, slots, ASKED) == Endpoint("a", 1)
    assert owner_of(8192, slots, ASKED) == Endpoint("10.0.0.7", 2)  # an empty host is the one that was asked
    assert owner_of(5, slots[1:], ASKED) is None
    assert masters_of(slots, ASKED) == (Endpoint("a", 1), Endpoint("10.0.0.7", 2))


def test_read_replies_become_keys_ids_and_named_fields() -> None:
    reply = [[b"a", [[b"1-0", [b"type", b"end", b"x", b"\xff"]], [b"1-1", [b"type", b""]]]], [b"b", [[b"2-0", None]]]]

    assert to_batch(reply) == [
        ("a", [("1-0", {"type": b"end", "x": b"\xff"}), ("1-1", {"type": b""})]),
        ("b", [("2-0", {})]),  # pending, but deleted from the stream
    ]
    assert to_batch(None) == []


def test_field_names_that_are_no_utf8_do_not_break_the_reader() -> None:
    assert to_entry([b"1-0", [b"\xff\xfe", b"v"]]) == ("1-0", {"��": b"v"})


def test_info_is_parsed_into_its_fields() -> None:
    info = parse_info(b"# Server\r\nredis_version:7.2.4\r\nexecutable:C:/x\r\n\r\n# Clients\r\n")
    assert info == {"redis_version": "7.2.4", "executable": "C:/x"}


@pytest.mark.parametrize(
    ("text", "version"), [("6.2.14", (6, 2)), ("9", (9, 0)), ("255.255.255", (255, 255)), ("x", (0, 0))]
)
def test_versions_compare_by_their_first_two_numbers(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("fields", "url", "advice"),
    [
        ({"redis_version": "6.0.9"}, "redis://h", "Redis 6.2 or newer"),
        ({"redis_version": "7.2.4", "maxmemory_policy": "allkeys-lru"}, "redis://h", "set it to noeviction"),
        ({"redis_version": "7.2.4", "cluster_enabled": "1"}, "redis://h", "redis+cluster://"),
        ({"redis_version": "7.2.4", "cluster_enabled": "0"}, "redis+cluster://h", "write redis://"),
        ({"redis_version": "7.2.4", "maxmemory_policy": "noeviction"}, "redis://h", None),
        ({"redis_version": "6.2.0"}, "redis+sentinel://h/m", None),
    ],
)
def test_an_unfit_server_is_told_with_what_to_do(fields: dict[str, str], url: str, advice: str | None) -> None:
    problem = find_problem(fields, ServerAddress.parse(url))

    assert (problem is None) if advice is None else (advice in str(problem))


def test_a_connections_name_is_made_fit_for_the_server() -> None:
    assert to_client_name("gateway 1:räder\n") == "gateway-1:r-der-"
