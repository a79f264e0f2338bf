"""What callers may write, and what they are told when it cannot be run."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.chat_request import BadRequest, parse_chat, parse_completion, parse_simple
from bus.ids import ModelName
from bus.jobs import PROMPT_BYTES_MAX, ChatJob, Message, Sampling, decode_job, encode_job

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": HELLO} | fields)


def completion(**fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "prompt": "Once"} | fields)


def simple(**fields: Any) -> bytes:
    return orjson.dumps({"prompt": "Hello", "max_new_tokens": 50} | fields)


def parts(*many: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(many)}]}


def refusal(parse: Any, body: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(body)
    return caught.value


def test_the_smallest_chat_body_becomes_a_job_with_the_models_own_defaults() -> None:
    assert parse_chat(chat()).job == ChatJob(model=ModelName("m"), messages=(Message("user", "Hello"),))


def test_every_field_that_an_engine_understands_reaches_the_job() -> None:
    parsed = parse_chat(
        chat(
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            top_k=40,
            seed=-3,
            stop=["\n", "END"],
            stream=True,
            stream_options={"include_usage": True},
            user="u1",
        )
    )

    assert parsed.job.max_tokens == 7
    assert parsed.job.sampling == Sampling(temperature=0.0, top_p=0.5, top_k=40, seed=-3)
    assert parsed.job.stop == ("\n", "END")
    assert parsed.job.stream and parsed.include_usage and parsed.user == "u1"


def test_every_optional_may_be_null() -> None:
    names = [
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "n",
        "user",
    ]
    names += ["stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "response_format"]

    assert parse_chat(chat(**dict.fromkeys(names))).job == parse_chat(chat()).job


def test_neutral_values_of_unsupported_fields_are_accepted_because_clients_send_them() -> None:
    body = chat(
        n=1,
        logprobs=False,
        top_logprobs=0,
        logit_bias={},
        tools=[],
        tool_choice="auto",
        frequency_penalty=0.0,
        presence_penalty=0,
        response_format={"type": "text"},
        modalities=["text"],
        best_of=1,
        length_penalty=1.0,
    )

    assert parse_chat(body).job == parse_chat(chat()).job


def test_unknown_fields_are_ignored() -> None:
    assert parse_chat(chat(store=True, metadata={"a": 1}, whatever=[[]])).job == parse_chat(chat()).job


def test_text_parts_are_joined() -> None:
    body = chat(**parts({"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}))

    assert parse_chat(body).job.messages == (Message("user", "Hello"),)


def test_an_assistant_turn_that_only_called_tools_has_no_text() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    turns = [*HELLO, called, {"role": "tool", "content": "42"}]

    roles = [(one.role, one.content) for one in parse_chat(chat(messages=turns)).job.messages]

    assert roles == [("user", "Hello"), ("assistant", ""), ("tool", "42")]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_each_role_of_openai_is_accepted(role: str) -> None:
    assert parse_chat(chat(messages=[{"role": role, "content": "x"}])).job.messages[0].role == role


def test_a_tool_list_that_may_not_be_used_changes_nothing() -> None:
    assert parse_chat(chat(tools=[{"type": "function"}], tool_choice="none")).job == parse_chat(chat()).job


def test_stop_may_be_one_string_a_list_or_nothing() -> None:
    stops = [parse_chat(chat(stop=stop)).job.stop for stop in ("a", ["a", "b", "a"], [], None)]

    assert stops == [("a",), ("a", "b"), (), ()]


def test_a_missing_model_is_the_default_where_there_is_one() -> None:
    body = orjson.dumps({"messages": HELLO})

    assert parse_chat(body, default_model="smol").job.model == "smol"
    assert refusal(parse_chat, body).field == "model"


def test_seeds_fill_int64() -> None:
    assert [parse_chat(chat(seed=seed)).job.sampling.seed for seed in (2**63 - 1, -(2**63))] == [2**63 - 1, -(2**63)]


BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "invalid_type"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "invalid_type"),
    (parts({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
    (parts({"type": "image_url"}), "messages[0].content[0]", "unsupported_value"),
    ({"messages": [{"role": "user", "content": "x", "name": "n" * 300}]}, "messages[0].name", "too_large"),
    ({"messages": HELLO * 9000}, "messages", "too_large"),
    ({"model": "two words"}, "model", "invalid_value"),
    ({"model": 7}, "model", "invalid_type"),
    ({"model": ""}, "model", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -5}, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**9}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1e30}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", "invalid_type"),
    ({"max_completion_tokens": 9, "max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": False}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.01}, "top_p", "invalid_value"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"top_k": 2.0}, "top_k", "invalid_type"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["a", None]}, "stop[1]", "missing_required_parameter"),
    ({"stop": 3}, "stop", "invalid_type"),
    ({"stop": [str(i) for i in range(17)]}, "stop", "too_large"),
    ({"stop": "x" * 1025}, "stop", "too_large"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": []}, "stream_options", "invalid_type"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"n": 2}, "n", "unsupported_value"),
    ({"n": True}, "n", "unsupported_value"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": True}, "top_logprobs", "invalid_type"),
    ({"logit_bias": []}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "invalid_type"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "too_large"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": "0"}, "presence_penalty", "invalid_type"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", "invalid_value"),
    ({"repetition_penalty": 0.009}, "repetition_penalty", "invalid_value"),
    ({"repetition_penalty": 2.1}, "repetition_penalty", "invalid_value"),
    ({"min_p": 1.1}, "min_p", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
    ({"user": 5}, "user", "invalid_type"),
]


@pytest.mark.parametrize(("fields", "field", "code"), BAD_CHAT, ids=lambda value: str(value)[:40])
def test_a_bad_chat_field_is_named(fields: dict[str, Any], field: str, code: str) -> None:
    refused = refusal(parse_chat, chat(**fields))

    assert (refused.field, refused.code) == (field, code)
    assert field.split("[")[0] in refused.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": "a\0"}',
        b"[" * 5000,
        b'{"a":' * 3000,
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b'{"a": 1}}',
    ],
)
@pytest.mark.parametrize("parse", [parse_chat, parse_completion, parse_simple])
def test_what_is_not_a_json_object_in_utf8_is_refused_as_a_whole(parse: Any, body: bytes) -> None:
    refused = refusal(parse, body)

    assert (refused.field, refused.code) == (None, "invalid_json")


def test_a_body_above_the_limit_is_refused_before_it_is_parsed() -> None:
    assert refusal(parse_chat, b"{" * (PROMPT_BYTES_MAX + 1)).code == "too_large"


def test_a_completion_is_raw_text_with_openais_default_length() -> None:
    parsed = parse_completion(completion(stop="\n"))

    assert parsed.job == ChatJob(model=ModelName("m"), prompt="Once", max_tokens=16, stop=("\n",))


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    assert parse_completion(completion(prompt=["Once"])).job.prompt == "Once"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "a\0"}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_bad_completion_field_is_named(fields: dict[str, Any], field: str) -> None:
    assert refusal(parse_completion, completion(**fields)).field == field


def test_log_probabilities_are_asked_for_as_openai_has_it() -> None:
    chats = [chat(logprobs=True), chat(logprobs=True, top_logprobs=20), chat(logprobs=False), chat()]
    raws = [completion(logprobs=0), completion(logprobs=5), completion(logprobs=None), completion(logprobs=False)]

    assert [parse_chat(one).job.logprobs for one in chats] == [0, 20, None, None]
    assert [parse_completion(one).job.logprobs for one in raws] == [0, 5, None, None]


def test_penalties_and_biases_are_sampling() -> None:
    body = chat(
        presence_penalty=0.5,
        frequency_penalty=-2,
        repetition_penalty=1,
        min_p=0,
        logit_bias={"7": -100, "03": 1, "9": 0},
    )

    assert parse_chat(body).job.sampling == Sampling(
        presence_penalty=0.5,
        frequency_penalty=-2.0,
        repetition_penalty=1.0,  # not left out: the model's own default may be another
        min_p=0.0,
        logit_bias=((3, 1.0), (7, -100.0)),
    )


def test_the_simple_body_is_one_user_message() -> None:
    parsed = parse_simple(simple(temperature=0.7, top_p=0.9, top_k=5), default_model="smol")

    assert parsed.job == ChatJob(
        model=ModelName("smol"), messages=(Message("user", "Hello"),), max_tokens=50, sampling=Sampling(0.7, 0.9, 5)
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\0"}, "prompt"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**12}, "max_new_tokens"),
        ({"max_new_tokens": "50"}, "max_new_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": "x"}, "top_p"),
        ({"top_k": -2}, "top_k"),
    ],
)
def test_a_bad_simple_field_is_named(fields: dict[str, Any], field: str) -> None:
    refused = refusal(lambda body: parse_simple(body, "smol"), simple(**fields))

    assert refused.field == field
    assert field in refused.message


def test_an_error_repeats_a_callers_word_only_in_short_and_printable_form() -> None:
    part = {"type": "im\nage\x1b[31m" + "x" * 1000}

    refused = refusal(parse_chat, chat(messages=[{"role": "user", "content": [part]}]))

    assert refused.message.isprintable() and len(refused.message) < 160


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
known_fields = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "presence_penalty",
        "repetition_penalty",
        "min_p",
        "tools",
        "response_format",
        "user",
    ]
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "x"]) | json_values,
            "content": json_values,
            "tool_calls": json_values,
            "name": json_values,
        },
    ),
    max_size=3,
)
bodies = st.dictionaries(known_fields, json_values, max_size=6).flatmap(
    lambda fields: st.just(fields) | messages.map(lambda turns: {"model": "m"} | fields | {"messages": turns})
)


@given(bodies.map(orjson.dumps) | st.binary(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_bytes_give_a_job_that_survives_the_wire_or_a_named_refusal(body: bytes) -> None:
    """A parser that raises anything else is a 500 at the gateway and a hot loop at the dispatcher."""
    for parse in (parse_chat, parse_completion, parse_simple):
        try:
            job = parse(body, "smol").job
        except BadRequest as refused:
            assert 0 < len(refused.message) < 400  # noqa: PT017 - either outcome is right
        else:
            assert decode_job(encode_job(job)) == job
