"""The shapes that OpenAI clients parse; each test is a detail that broke some client in the field."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.codec.logprobs import Candidate, TokenLogprobs
from bus.ids import JobId
from gateway.logprobs_wire import chat_fragment, completion_fragment
from gateway.openai_wire import Answer, StreamShape, Usage, chat_completion, finish_reason, model_list, text_completion

CHAT = Answer("chat", JobId("c0-1"), "smol", 1_700_000_000)
TEXT = Answer("completions", JobId("c0-1"), "smol", 1_700_000_000)


def load(chunk: bytes | None) -> dict[str, Any]:
    assert chunk is not None
    value = orjson.loads(chunk)
    assert isinstance(value, dict)
    return value


def test_the_first_chunk_gives_the_role_and_no_other_does() -> None:
    shape = StreamShape(CHAT, include_usage=False)

    assert load(shape.role())["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "role" not in load(shape.text("hi"))["choices"][0]["delta"]
    assert load(shape.finish("stop"))["choices"][0]["delta"] == {}


@pytest.mark.parametrize("answer", [CHAT, TEXT])
@pytest.mark.parametrize("include_usage", [True, False])
def test_all_chunks_share_id_created_model_and_object(answer: Answer, include_usage: bool) -> None:
    shape = StreamShape(answer, include_usage=include_usage)
    chunks = [shape.role(), shape.text("a"), shape.finish("stop"), shape.usage(Usage(3, 4))]

    heads = [{k: load(c)[k] for k in ("id", "created", "model", "object")} for c in chunks if c is not None]

    assert all(head == heads[0] for head in heads)
    assert type(heads[0]["created"]) is int


def test_usage_comes_last_without_choices_and_only_when_asked() -> None:
    asked, unasked = StreamShape(CHAT, include_usage=True), StreamShape(CHAT, include_usage=False)

    assert load(asked.usage(Usage(3, 4)))["choices"] == []
    assert load(asked.usage(Usage(3, 4)))["usage"]["total_tokens"] == 7
    assert load(asked.text("x"))["usage"] is None
    assert unasked.usage(Usage(3, 4)) is None
    assert "usage" not in load(unasked.text("x"))


@given(st.text())
def test_any_text_survives_the_prepared_frame(text: str) -> None:
    """The bytes around a text are made once; no text may break out of them."""
    for answer in (CHAT, TEXT):
        chunk = load(StreamShape(answer, include_usage=False).text(text))
        choice = chunk["choices"][0]
        assert (choice["delta"]["content"] if answer is CHAT else choice["text"]) == text
        assert choice["finish_reason"] is None


def test_a_model_named_like_the_mark_does_not_confuse_the_frame() -> None:
    answer = Answer("chat", JobId("c0-1"), "u0000\\", 1)

    assert load(StreamShape(answer, include_usage=False).text("x"))["choices"][0]["delta"]["content"] == "x"


def test_a_plain_answer_has_every_field_clients_read() -> None:
    body = chat_completion(CHAT, b"Paris.", "stop", Usage(5, 2))

    choice = body["choices"][0]  # type: ignore[index]  # JSON of our own making
    assert choice["message"] == {"role": "assistant", "content": "Paris.", "refusal": None}
    assert choice["logprobs"] is None
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert body["object"] == "chat.completion"


EURO = "a€b".encode()  # three tokens: the last byte of the sign begins the third
HALF = TokenLogprobs(1, Candidate(EURO[1:3], -0.5), (Candidate(EURO[1:3], -0.5), Candidate(b"<|end|>", -2.0, True)))
SCORED = [TokenLogprobs(0, Candidate(b"a", -1.0)), HALF, TokenLogprobs(3, Candidate(EURO[3:], -0.25))]


def test_a_chats_log_probabilities_are_openais() -> None:
    body = chat_completion(CHAT, EURO, "stop", Usage(5, 3), SCORED)

    logprobs = body["choices"][0]["logprobs"]  # type: ignore[index]  # JSON of our own making
    assert logprobs["refusal"] is None
    first, half, last = logprobs["content"]
    assert first == {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    assert (half["token"], half["bytes"]) == ("\\xe2\\x82", [0xE2, 0x82])
    assert half["top_logprobs"][1] == {"token": "<|end|>", "logprob": -2.0, "bytes": None}
    assert bytes(first["bytes"] + half["bytes"] + last["bytes"]) == EURO


def test_a_completions_are_four_lists_with_offsets_in_characters() -> None:
    body = text_completion(TEXT, EURO, "stop", Usage(5, 3), SCORED)

    assert body["choices"][0]["logprobs"] == {  # type: ignore[index]  # JSON of our own making
        "tokens": ["a", "\\xe2\\x82", "\\xacb"],
        "token_logprobs": [-1.0, -0.5, -0.25],
        "top_logprobs": [{"a": -1.0}, {"\\xe2\\x82": -0.5, "<|end|>": -2.0}, {"\\xacb": -0.25}],
        "text_offset": [0, 1, 1],
    }


@pytest.mark.parametrize("cuts", [(), (0,), (1,), (1, 2), (0, 2, 3)])
async def test_log_probabilities_made_in_parts_are_the_same(cuts: tuple[int, ...]) -> None:
    async def slices() -> AsyncIterator[list[TokenLogprobs]]:
        for begin, end in itertools.pairwise((0, *cuts, len(SCORED))):
            yield SCORED[begin:end]

    usage = Usage(5, 3)
    chat = chat_completion(CHAT, EURO, "stop", usage, await chat_fragment(slices()))
    text = text_completion(TEXT, EURO, "stop", usage, await completion_fragment(slices(), EURO))

    assert orjson.dumps(chat) == orjson.dumps(chat_completion(CHAT, EURO, "stop", usage, SCORED))
    assert orjson.dumps(text) == orjson.dumps(text_completion(TEXT, EURO, "stop", usage, SCORED))


@pytest.mark.parametrize("answer", [CHAT, TEXT])
def test_a_chunk_brings_those_of_its_own_text(answer: Answer) -> None:
    shape = StreamShape(answer, include_usage=True)

    chunks = [load(shape.scored_text(EURO[:1], 0, SCORED[:1])), load(shape.scored_text(EURO[1:], 1, SCORED[1:]))]

    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    if answer is CHAT:
        assert [[one["logprob"] for one in part["content"]] for part in found] == [[-1.0], [-0.5, -0.25]]
    else:
        assert [part["text_offset"] for part in found] == [[0], [1, 1]]
    assert load(shape.text("x"))["choices"][0]["logprobs"] is None
    assert all(set(chunk) == set(load(shape.text("x"))) for chunk in chunks)


def test_completions_have_text_and_their_own_id() -> None:
    body = text_completion(TEXT, b"x", "length", Usage(1, 1))

    assert body["object"] == "text_completion"
    assert str(body["id"]).startswith("cmpl-")
    assert body["choices"][0]["text"] == "x"  # type: ignore[index]  # JSON of our own making


@pytest.mark.parametrize(("reason", "openai"), [("stop", "stop"), ("length", "length"), ("eos", "stop"), ("", "stop")])
def test_engines_reasons_become_openais(reason: str, openai: str) -> None:
    assert finish_reason(reason) == openai


def test_models_are_listed_by_name() -> None:
    listed = model_list(["b", "a"], 1)

    assert [model["id"] for model in listed["data"]] == ["a", "b"]  # type: ignore[attr-defined]  # JSON
