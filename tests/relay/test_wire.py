"""The bodies we send and the answers we accept, checked against what servers in the field do."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.ids import ModelName
from bus.jobs import ChatJob, Message, Sampling
from gpu_worker.relay_engine.faults import CallFailed, NodeBroke, failure_of_status, no_logprobs, sanitise
from gpu_worker.relay_engine.tally import Tally
from gpu_worker.relay_engine.wire import (
    Chunk,
    NodeApi,
    base_of,
    flat_prompt,
    openai_request,
    read_answer,
    read_event,
    read_models,
    read_simple,
    simple_request,
)

API = NodeApi("openai", "http://node", ("m", "other"))
MODEL = ModelName("m")
TOO_LONG = "context_length_exceeded"


def chat(*turns: tuple[str, str], **fields: Any) -> ChatJob:
    return ChatJob(model=MODEL, messages=tuple(Message(*turn) for turn in turns or [("user", "Hi")]), **fields)


def body(job: ChatJob, api: NodeApi = API, **options: Any) -> dict[str, Any]:
    found = orjson.loads(openai_request(api, job, 7, **options).body)
    assert isinstance(found, dict)
    return found


def event(**fields: Any) -> str:
    return orjson.dumps(fields).decode()


def delta(text: object = None, finish: str | None = None, **more: Any) -> str:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **more)


def test_only_what_the_caller_asked_for_is_sent_so_that_strict_servers_do_not_refuse_it() -> None:
    assert body(chat()) == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 7,
        "messages": [{"role": "user", "content": "Hi"}],
    }


def test_every_sampling_field_reaches_the_node() -> None:
    sent = body(chat(sampling=Sampling(0.0, 0.5, 3), stop=("a",), ignore_eos=True), max_tokens=9)

    assert sent["temperature"] == 0.0 and sent["top_p"] == 0.5 and sent["top_k"] == 3
    assert sent["stop"] == ["a"] and sent["ignore_eos"] is True and sent["max_tokens"] == 9


def test_a_negative_or_large_seed_becomes_one_that_every_server_takes() -> None:
    seeds = [orjson.loads(openai_request(API, chat(), seed).body)["seed"] for seed in (-1, 2**63 - 1, 5)]

    assert seeds == [2**31 - 1, 2**31 - 1, 5]


def test_a_continued_chat_leaves_the_assistants_message_open() -> None:
    sent = body(chat(), said="So far")

    assert sent["messages"][-1] == {"role": "assistant", "content": "So far"}
    assert sent["continue_final_message"] is True and sent["add_generation_prompt"] is False


def test_a_raw_prompt_is_continued_as_it_stands() -> None:
    outgoing = openai_request(API, ChatJob(model=MODEL, prompt="Once"), 7, said=" upon")

    assert outgoing.path == "/v1/completions"
    assert orjson.loads(outgoing.body)["prompt"] == "Once upon"


def test_a_node_with_one_model_is_asked_for_that_one_whatever_the_fleet_calls_it() -> None:
    assert body(chat(), NodeApi("openai", "x", ("their/own",)))["model"] == "their/own"
    assert body(chat(), NodeApi("openai", "x", ("a", "b")))["model"] == "m"


def test_the_developer_role_is_sent_as_system_because_most_templates_know_no_other() -> None:
    assert body(chat(("developer", "x"), ("user", "y")))["messages"][0]["role"] == "system"


def test_a_simple_node_gets_one_user_message_as_it_is_and_a_conversation_as_a_transcript() -> None:
    assert flat_prompt(chat()) == "Hi"
    assert flat_prompt(chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"))) == (
        "Be brief.\n\nUser: Hi\n\nAssistant: Yo\n\nUser: Bye\n\nAssistant:"
    )
    assert orjson.loads(simple_request(chat(sampling=Sampling(top_k=3)), 50).body) == {
        "prompt": "Hi",
        "max_new_tokens": 50,
        "top_k": 3,
    }


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_base_of_a_url_may_be_written_in_four_ways(url: str) -> None:
    assert base_of(url) == "http://h:1"


def test_the_list_of_models_tells_whether_a_server_can_continue() -> None:
    listed = {"data": [{"id": "a", "owned_by": "vllm"}, {"id": "b"}]}

    assert read_models("u", orjson.dumps(listed)) == NodeApi("openai", "u", ("a", "b"), "final_message")
    assert read_models("u", b'{"data": [{"id": "a", "owned_by": "me"}]}') == NodeApi("openai", "u", ("a",), "none")


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b"{}", b'{"data": 5}'])
def test_what_is_no_list_of_models_is_no_openai_server(raw: bytes) -> None:
    assert read_models("u", raw) is None


@pytest.mark.parametrize(
    ("data", "chunk"),
    [
        (delta("Hi"), Chunk("Hi")),
        (delta(None), Chunk()),
        (delta("", "stop"), Chunk(finish="stop")),
        (delta("x", "length"), Chunk("x", "length")),
        (delta("", "tool_calls"), Chunk(finish="stop")),
        (delta("x", ""), Chunk("x")),
        (event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}), Chunk("", "", 3, 4)),
        (event(choices=[], usage={"prompt_tokens": "3", "completion_tokens": -4}), Chunk()),
        (event(choices=[{"text": "raw", "finish_reason": None}]), Chunk("raw")),
        (event(choices=[{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]), Chunk()),
        (event(id="only"), Chunk()),
        ("[DONE]", Chunk(done=True)),
        (" [DONE] ", Chunk(done=True)),
    ],
)
def test_chunks_of_many_servers_are_understood(data: str, chunk: Chunk) -> None:
    assert read_event(data) == chunk


@pytest.mark.parametrize(
    "data", ["{", "5", '"x"', event(choices=[5]), event(choices="x"), delta(5), event(error="boom")]
)
def test_what_is_no_chunk_is_the_nodes_fault(data: str) -> None:
    with pytest.raises(CallFailed) as caught:
        read_event(data)

    assert caught.value.fault == "node"


def test_a_whole_answer_is_one_chunk() -> None:
    raw = orjson.dumps({"choices": [{"message": {"content": "Hi"}, "finish_reason": "length"}]})

    assert read_answer(raw) == Chunk("Hi", "length", done=True)
    assert read_simple(b'{"response": "Hi", "more": 1}') == Chunk("Hi", "stop", done=True)


@pytest.mark.parametrize("raw", [b"{}", b'{"response": 5}', b"nope", b'{"error": "no"}', b"[]"])
def test_a_simple_answer_without_text_is_the_nodes_fault(raw: bytes) -> None:
    with pytest.raises(CallFailed) as caught:
        read_simple(raw)

    assert caught.value.fault == "node"


@pytest.mark.parametrize(
    ("status", "raw", "fault", "code"),
    [
        (400, b'{"error": {"message": "bad top_p"}}', "client", "bad_request"),
        (400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}', "client", TOO_LONG),
        (400, b'{"message": "This model\'s maximum context length is 5"}', "client", TOO_LONG),
        (400, b'{"error":{"code":400,"type":"exceed_context_size_error","message":"x"}}', "client", TOO_LONG),
        (422, b'{"detail": [{"loc": ["body"]}]}', "client", "bad_request"),
        (413, b"", "client", "bad_request"),
        (401, b'{"error": "Unauthorized"}', "node", "node_error"),
        (404, b"", "node", "node_error"),
        (429, b'{"error": "busy"}', "node", "node_error"),
        (307, b"", "node", "node_error"),
        (500, b"<html>", "node", "node_error"),
        (503, b"\xff\xfe", "node", "node_error"),
    ],
)  # fmt: skip
def test_only_a_status_about_the_request_is_the_callers_fault(status: int, raw: bytes, fault: str, code: str) -> None:
    failure = failure_of_status(status, raw)

    assert (failure.fault, failure.code, failure.status) == (fault, code, status)


@pytest.mark.parametrize(
    ("error", "minded"),
    [
        ({"message": "top_logprobs is at most 5"}, True),
        ({"message": "no such thing here", "param": "top_logprobs"}, True),
        ({"message": "not here", "code": "logprobs_unsupported"}, True),
        ({"message": "bad value in {'logprobs': true, 'top_p': 7}", "param": "top_p"}, False),
        ({"message": "9000 tokens in {'logprobs': true}", "code": "context_length_exceeded"}, False),
        ({"message": "maximum context length is 4096, got {'logprobs': true}"}, False),
        ({"message": "slow down: {'logprobs': true}", "code": "rate_limit_exceeded"}, False),
        ({"message": "bad top_p"}, False),
    ],
)
def test_a_refusal_is_about_log_probabilities_if_the_node_names_them_not_if_it_echoes_the_request(
    error: dict[str, str], minded: bool
) -> None:
    failure = failure_of_status(400, orjson.dumps({"error": error}))

    assert (no_logprobs(failure) is not None) == minded


@pytest.mark.parametrize(
    ("place", "words", "minded"),
    [
        (["body", "top_logprobs"], "no", True),
        (["body"], "top_logprobs needs logprobs", True),
        (["body", "messages", 0], "no", False),
        (["body"], "no", False),
        ("body", 5, False),
    ],
)
def test_place_and_words_of_a_validation_error_say_what_is_minded(place: object, words: object, minded: bool) -> None:
    detail = [{"loc": place, "msg": words, "input": {"logprobs": True}}, "more"]

    failure = failure_of_status(422, orjson.dumps({"detail": detail}))

    assert (no_logprobs(failure) is not None) == minded


@pytest.mark.parametrize("status", [429, 500])
def test_what_is_no_refusal_of_the_request_is_not_about_log_probabilities(status: int) -> None:
    assert no_logprobs(failure_of_status(status, b'{"error": "in {\'logprobs\': true}"}')) is None


def test_a_nodes_own_words_are_made_printable_and_short() -> None:
    said = sanitise("line\r\n\x1b[31mred\u202e" + "x" * 1000)

    assert said.isprintable() and len(said) <= 300 and said.startswith("line [31mred")


def test_an_answer_is_over_by_its_finish_reason_or_by_done_after_text_and_else_it_broke_off() -> None:
    def reason(*chunks: Chunk) -> str:
        tally = Tally(1)
        for chunk in chunks:
            tally.count(chunk)
        return tally.reason

    assert reason(Chunk("a"), Chunk(finish="length"), Chunk(done=True)) == "length"
    assert reason(Chunk(finish="stop")) == "stop"
    assert reason(Chunk("a"), Chunk(done=True)) == "stop"
    assert reason(Chunk("a")) == ""
    assert reason(Chunk(done=True)) == ""


def test_a_node_that_reports_no_usage_is_counted_by_its_chunks_or_its_bytes() -> None:
    tally = Tally(5)
    for chunk in (Chunk("a"), Chunk("b"), Chunk(finish="stop")):
        tally.count(chunk)

    assert (tally.prompt_tokens, tally.new_tokens(9, streamed=True), tally.new_tokens(9, streamed=False)) == (5, 2, 3)


def test_node_broke_is_the_nodes_fault() -> None:
    assert NodeBroke("x").fault == "node"


known_names = st.sampled_from(
    [
        "choices",
        "delta",
        "content",
        "message",
        "text",
        "finish_reason",
        "usage",
        "error",
        "detail",
        "param",
        "loc",
        "code",
        "data",
        "id",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_names, inner, max_size=4),
    max_leaves=8,
)


@given(json_values.map(orjson.dumps) | st.binary(max_size=60))
@settings(max_examples=400, deadline=None)
def test_whatever_a_node_sends_is_a_chunk_or_a_failure_with_a_printable_line(raw: bytes) -> None:
    """Anything else would be an error of ours, in the middle of somebody's job."""
    for read in (read_answer, read_simple, lambda one: read_event(one.decode(errors="replace"))):
        try:
            chunk = read(raw)
        except CallFailed as failure:
            assert failure.message.isprintable()  # noqa: PT017 - either outcome is right
        else:
            chunk.text.encode()
    assert failure_of_status(400, raw).message.isprintable()
    read_models("u", raw)
