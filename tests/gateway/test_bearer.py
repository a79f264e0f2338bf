"""What a request says about its sender."""

import pytest

from gateway.bearer import client_address, parse_bearer, parse_idempotency_key, parse_user_address, request_id
from gateway.errors import ApiError


@pytest.mark.parametrize("header", ["Bearer mr_x", "bearer mr_x", "BEARER  mr_x ", " Bearer mr_x"])
def test_the_scheme_may_be_written_in_any_case(header: str) -> None:
    assert parse_bearer(header) == "mr_x"


@pytest.mark.parametrize(
    "header", ["", "mr_x", "Basic mr_x", "Bearer", "Bearer ", "Bearer \udcff", "Bearer " + "x" * 600, None]
)
def test_anything_else_is_401_and_does_not_echo_the_key(header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_bearer(header)

    assert caught.value.status == 401
    assert "mr_x" not in caught.value.message


@pytest.mark.parametrize("header", [None, "", "  "])
def test_a_missing_user_address_is_400(header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_user_address(header)

    assert (caught.value.status, caught.value.code) == (400, "missing_user_address")


@pytest.mark.parametrize("header", ["a b", "x" * 129, "ä"])
def test_a_strange_user_address_is_400(header: str) -> None:
    with pytest.raises(ApiError):
        parse_user_address(header)


def test_a_clients_request_id_is_kept_unless_it_could_break_a_log_line() -> None:
    assert request_id("abc-1", "fresh") == "abc-1"
    assert request_id("a b\n", "fresh") == "fresh"
    assert request_id(None, "fresh") == "fresh"


def test_a_forwarded_address_counts_only_behind_a_trusted_proxy_and_only_its_last_hop() -> None:
    """Everything before the last hop is what the client claims."""
    assert client_address("10.0.0.1", "6.6.6.6, 7.7.7.7", trust_forwarded=True) == "7.7.7.7"
    assert client_address("10.0.0.1", "6.6.6.6", trust_forwarded=False) == "10.0.0.1"
    assert client_address(None, None, trust_forwarded=True) == "unknown"


@pytest.mark.parametrize("header", ["", "a b", "x" * 256])
def test_a_strange_idempotency_key_is_400(header: str) -> None:
    with pytest.raises(ApiError):
        parse_idempotency_key(header)
