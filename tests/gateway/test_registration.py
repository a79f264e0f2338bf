"""What a node's owner may send, and what is said when it is wrong."""

from typing import Any

import pytest

from gateway.errors import ApiError
from gateway.fields import parse_json
from gateway.registration import parse_heartbeat, parse_registration


def body(**changes: Any) -> dict[str, Any]:
    whole = {
        "node_id": "n-1",
        "api_url": "https://your-gpu.com",
        "capabilities": {"gpu_memory_gb": 24, "layers": [0, 1, 2, 3]},
    }
    return {**whole, **changes}


def capabilities(**changes: Any) -> dict[str, Any]:
    return body(capabilities={"gpu_memory_gb": 24, **changes})


def test_the_readmes_example_is_a_registration() -> None:
    node = parse_registration(body())

    assert (node.node_id, node.api_url, node.gpu_memory_gb) == ("n-1", "https://your-gpu.com", 24.0)
    assert (node.layers, node.model, node.max_concurrency) == ((0, 1, 2, 3), None, 4)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://10.0.0.1:8000/", "http://10.0.0.1:8000"),
        ("http://h:1/v1", "http://h:1"),
        ("http://h/v1/", "http://h"),
        ("https://h/a/b", "https://h/a/b"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_is_kept_as_its_base(given: str, kept: str) -> None:
    """Owners copy the `/v1` from OpenAI clients."""
    assert parse_registration(body(api_url=given)).api_url == kept


@pytest.mark.parametrize(("given", "kept"), [(["logprobs", "logprobs"], ("logprobs",)), ([], ()), (None, None)])
def test_what_a_node_can_do_is_said_or_left_open(given: Any, kept: Any) -> None:
    assert parse_registration(capabilities(can=given)).can == kept


def test_unknown_fields_and_nulls_are_left_out() -> None:
    node = parse_registration({**capabilities(layers=None, model=None, max_concurrency=None, color="red"), "x": 1})

    assert (node.layers, node.model, node.max_concurrency) == (None, None, 4)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (body(node_id=None), "node_id"),
        (body(node_id=5), "node_id"),
        (body(node_id="a b"), "node_id"),
        (body(node_id=""), "node_id"),
        (body(node_id="x" * 65), "node_id"),
        (body(node_id="ä"), "node_id"),
        (body(node_id="n\x00"), "node_id"),
        (body(node_id="n\n"), "node_id"),
        (body(api_url=None), "api_url"),
        (body(api_url=["http://h"]), "api_url"),
        (body(api_url="ftp://h"), "api_url"),
        (body(api_url="your-gpu.com"), "api_url"),
        (body(api_url="http://"), "api_url"),
        (body(api_url="http://h:99999"), "api_url"),
        (body(api_url="http://h:0"), "api_url"),
        (body(api_url="http://[::1"), "api_url"),
        (body(api_url="http://user:pass@h"), "api_url"),
        (body(api_url="http://h/?a=1"), "api_url"),
        (body(api_url="http://h\r\nHost: x"), "api_url"),
        (body(api_url="http://" + "h" * 3000), "api_url"),
        (body(capabilities=None), "capabilities"),
        (body(capabilities=[]), "capabilities"),
        (body(capabilities={}), "capabilities.gpu_memory_gb"),
        (capabilities(gpu_memory_gb="24"), "capabilities.gpu_memory_gb"),
        (capabilities(gpu_memory_gb=-1), "capabilities.gpu_memory_gb"),
        (capabilities(gpu_memory_gb=True), "capabilities.gpu_memory_gb"),
        (capabilities(gpu_memory_gb=1e30), "capabilities.gpu_memory_gb"),
        (capabilities(layers="0-3"), "capabilities.layers"),
        (capabilities(layers=[0, "1"]), "capabilities.layers[1]"),
        (capabilities(layers=[-1]), "capabilities.layers[0]"),
        (capabilities(layers=[1.5]), "capabilities.layers[0]"),
        (capabilities(layers=[True]), "capabilities.layers[0]"),
        (capabilities(layers=list(range(2000))), "capabilities.layers"),
        (capabilities(model=7), "capabilities.model"),
        (capabilities(model="a b"), "capabilities.model"),
        (capabilities(can="logprobs"), "capabilities.can"),
        (capabilities(can=["logprobs", 5]), "capabilities.can"),
        (capabilities(can=["telepathy"]), "capabilities.can"),
        (capabilities(max_concurrency=0), "capabilities.max_concurrency"),
        (capabilities(max_concurrency="4"), "capabilities.max_concurrency"),
        (capabilities(max_concurrency=10**9), "capabilities.max_concurrency"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_registration(wrong)

    assert (caught.value.status, caught.value.param) == (400, field)
    assert field in caught.value.message


@pytest.mark.parametrize("heartbeat", ["n-1", {"node_id": "n-1"}, {"node_id": "n-1", "load": 3}])
def test_a_heartbeat_is_an_id_or_an_object_with_one(heartbeat: Any) -> None:
    assert parse_heartbeat(heartbeat) == "n-1"


@pytest.mark.parametrize("heartbeat", [None, 5, [], {}, {"node_id": 5}, "", "a b", True])
def test_any_other_heartbeat_is_400(heartbeat: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_heartbeat(heartbeat)

    assert (caught.value.status, caught.value.param) == (400, "node_id")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  ",
        b"{",
        b"nul",
        b'{"a":1} x',
        b'{"a":NaN}',
        b'"\xff"',
        b'"\\ud800"',
        b"[" * 5000 + b"]" * 5000,
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
)
def test_what_is_not_json_is_a_clear_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(raw)

    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
