"""Every refusal has one code; status, envelope and waiting time follow from it."""

import orjson
import pytest

from gateway.errors import KINDS, ApiError, job_error, render, retry_after_s


@pytest.mark.parametrize(("wait_ms", "seconds"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60), (10_000_000, 60)])
def test_a_wait_is_rounded_up_and_stays_between_one_second_and_a_minute(wait_ms: int, seconds: int) -> None:
    """Too early is refused again; beyond 120 s openai-python does not retry at all."""
    assert retry_after_s(wait_ms) == seconds


def test_api_routes_answer_in_their_own_envelope() -> None:
    status, headers, body = render(ApiError("queue_full", "2000 jobs wait", retry_after_ms=4_200), "/api/chat/gpu")

    assert status == 429
    assert headers["Retry-After"] == "5"
    assert orjson.loads(body) == {
        "success": False,
        "error": {"code": "queue_full", "message": "2000 jobs wait", "retry_after": 5},
    }


def test_openai_routes_answer_in_openais_envelope_with_all_four_fields() -> None:
    status, _, body = render(ApiError("invalid_request", "bad", param="messages[0].role"), "/v1/chat/completions")

    assert status == 400
    assert orjson.loads(body) == {
        "error": {
            "message": "bad",
            "type": "invalid_request_error",
            "param": "messages[0].role",
            "code": "invalid_request",
        }
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/nowhere"])
@pytest.mark.parametrize("code", sorted(KINDS))
def test_every_code_renders_as_an_error_object_on_every_path(code: str, path: str) -> None:
    """`error` as a bare string crashes clients."""
    status, headers, body = render(ApiError(code, "words"), path)

    assert 400 <= status < 600
    assert headers["Content-Type"].startswith("application/json")
    assert isinstance(orjson.loads(body)["error"], dict)


def test_401_names_the_scheme() -> None:
    assert "Bearer" in render(ApiError("missing_api_key", "no key"), "/v1/models")[1]["WWW-Authenticate"]


@pytest.mark.parametrize("code", [code for code, kind in KINDS.items() if kind.status in (429, 503)])
def test_busy_answers_always_say_when_to_come_back(code: str) -> None:
    assert 1 <= int(render(ApiError(code, "busy"), "/v1/models")[1]["Retry-After"]) <= 60


def test_a_failure_that_must_not_be_repeated_says_so() -> None:
    """SDKs retry 409 and 5xx unless x-should-retry forbids it; a poison job would go round the fleet again."""
    assert render(job_error("crash", "three workers died"), "/v1/chat/completions")[1]["x-should-retry"] == "false"


def test_an_unknown_end_of_a_job_is_the_nodes_fault() -> None:
    error = job_error("cuda_on_fire", "smoke")

    assert (error.code, error.status, error.message) == ("node_error", 502, "smoke")


def test_an_overflow_keeps_openais_status_and_code() -> None:
    error = job_error("context_length_exceeded", "This model's maximum context length is 2048 tokens")

    status, _, body = render(error, "/v1/chat/completions")

    assert (status, orjson.loads(body)["error"]["code"]) == (400, "context_length_exceeded")
