"""What a refused job means for its sender, and what the headers of a chat may say. Pure."""

import pytest

from bus.calls.caller import Refusal
from bus.calls.following import Ended
from bus.chat_request import parse_chat
from bus.ids import ModelName
from bus.jobs import ChatJob
from gateway.chats import parse_deadline_ms, parse_policy, parse_with, reason_of, refusal_error
from gateway.errors import ApiError

JOB = ChatJob(model=ModelName("smol"))


@pytest.mark.parametrize(
    ("code", "default_model", "status", "told"),
    [
        ("no_model", "smol", 503, "no_node"),  # the fleet's own model: it may come back any second
        ("no_model", "other", 404, "model_not_found"),
        ("no_node", "other", 503, "no_node"),
        ("uncovered", "smol", 503, "uncovered"),
        ("queue_full", "smol", 429, "queue_full"),
        ("quota_full", "smol", 429, "quota_full"),
        ("idem_conflict", "smol", 422, "idempotency_key_reused"),
        ("memory_full", "smol", 503, "unavailable"),
        ("unavailable", "smol", 503, "unavailable"),
        ("something new", "smol", 503, "unavailable"),
    ],
)
def test_a_refusal_has_the_status_that_its_sender_can_act_on(
    code: str, default_model: str, status: int, told: str
) -> None:
    error = refusal_error(Refusal(code, "because", 7_300), JOB, default_model)

    assert (error.status, error.code) == (status, told)
    if status in (429, 503):
        assert error.retry_after_s == 8


def test_a_wait_that_nobody_computed_still_has_a_value() -> None:
    assert refusal_error(Refusal("queue_full", "full", 0), JOB, "smol").retry_after_s == 5


def test_an_end_is_counted_under_one_of_few_words() -> None:
    """It is a label of the metrics: a node's own words must not become one."""
    assert reason_of(None) == "client_gone"
    assert reason_of(Ended(state="done", reason="eos")) == "stop"
    assert reason_of(Ended(state="failed", reason="x", error_code="cuda error 77 at 0xdead")) == "node_error"


def test_a_keyed_request_keeps_its_job_unless_it_says_otherwise() -> None:
    assert parse_policy(None, "keep") == "keep"
    assert parse_policy("Cancel", "keep") == "cancel"
    with pytest.raises(ApiError):
        parse_policy("maybe", "cancel")


@pytest.mark.parametrize("header", ["", "x", "-5", "99", "600001", "1e3", "٣٠٠", "9" * 40])
def test_a_deadline_beyond_the_bounds_is_400(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_deadline_ms(header, 600_000)

    assert caught.value.param == "X-Deadline-Ms"


def test_a_deadline_may_only_be_shorter_than_the_settings() -> None:
    assert parse_deadline_ms(None, 600_000) == 600_000
    assert parse_deadline_ms(" 5000 ", 600_000) == 5_000


def test_a_parsers_refusal_names_the_field() -> None:

    with pytest.raises(ApiError) as caught:
        parse_with(parse_chat, b'{"messages": 5}', "smol")

    assert (caught.value.status, caught.value.param) == (400, "messages")
