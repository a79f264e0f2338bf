"""OpenAI's response shapes, built from plain values. Pure; the details that clients trip over are in the comments.

A stream of one answer: role chunk, text chunks, one finish chunk, (usage chunk), [DONE]. All carry the same id,
created and model. The bytes around a text chunk never change within a stream, so they are made once and a chunk
costs one `dumps` of its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import orjson

from bus.codec.logprobs import TokenLogprobs
from bus.ids import JobId
from gateway.logprobs_wire import TextPlaces, chat_logprobs, completion_logprobs

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
Endpoint = Literal["chat", "completions"]
ID_PREFIXES: Final[dict[Endpoint, str]] = {"chat": "chatcmpl-", "completions": "cmpl-"}


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What stays the same in every piece of one response. created: unix seconds."""

    endpoint: Endpoint
    job_id: JobId
    model: str
    created: int

    @property
    def response_id(self) -> str:
        return ID_PREFIXES[self.endpoint] + self.job_id


def finish_reason(reason: str) -> FinishReason:
    """Engines know more reasons than OpenAI; an ended answer is `stop` unless it was cut by its length."""
    match reason:
        case "length" | "tool_calls" | "content_filter":
            return reason
        case _:
            return "stop"


class StreamShape:
    """The chunks of one stream, as JSON bytes without the SSE framing."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._chars = 0  # of the texts that came with log probabilities
        mark = b"\x00"
        whole = orjson.dumps(self._chunk(self._choice({"content": "\x00"}, "\x00", None)))
        # orjson writes U+0000 as the six characters \u0000; what stands before and after never changes.
        self._head, _, self._tail = whole.partition(orjson.dumps(mark.decode()))

    def role(self) -> bytes | None:
        """The first chunk of a chat, once; completions have none. Without it accumulating clients break."""
        if self._answer.endpoint == "completions":
            return None
        return orjson.dumps(self._chunk(self._choice({"role": "assistant", "content": ""}, "", None)))

    def text(self, text: str) -> bytes:
        return self._head + orjson.dumps(text) + self._tail

    def scored_text(self, text: bytes, start: int, records: Sequence[TokenLogprobs]) -> bytes:
        """Text from byte `start` of the answer on, with the log probabilities of its tokens."""
        shown = text.decode("utf-8", "replace")
        if self._answer.endpoint == "chat":
            logprobs: object = chat_logprobs(records)
        else:
            logprobs = completion_logprobs(records, TextPlaces(text, start, self._chars))
        self._chars += len(shown)
        choice = self._choice({"content": shown}, shown, None)
        return orjson.dumps(self._chunk({**choice, "logprobs": logprobs}))

    def finish(self, reason: FinishReason) -> bytes:
        """Exactly one a stream, after all text."""
        return orjson.dumps(self._chunk(self._choice({}, "", reason)))

    def usage(self, usage: Usage) -> bytes | None:
        """The last chunk, with no choices, only for those who asked: others write `chunk.choices[0]`."""
        if not self._include_usage:
            return None
        return orjson.dumps({**self._frame([]), "usage": usage.to_json()})

    def _choice(self, delta: dict[str, object], text: str, reason: FinishReason | None) -> dict[str, object]:
        body: dict[str, object] = {"text": text} if self._answer.endpoint == "completions" else {"delta": delta}
        return {"index": 0, **body, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choice: dict[str, object]) -> dict[str, object]:
        chunk = self._frame([choice])
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _frame(self, choices: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self._answer.response_id,
            "object": "chat.completion.chunk" if self._answer.endpoint == "chat" else "text_completion",
            "created": self._answer.created,
            "model": self._answer.model,
            "system_fingerprint": None,
            "choices": choices,
        }


# The log probabilities of a whole answer, or the JSON of them; None: they are not asked for.
Records = Sequence[TokenLogprobs] | orjson.Fragment | None


def chat_completion(
    answer: Answer, text: bytes, reason: FinishReason, usage: Usage, records: Records = None
) -> dict[str, object]:
    message = {"role": "assistant", "content": text.decode("utf-8", "replace"), "refusal": None}
    logprobs = chat_logprobs(records) if isinstance(records, Sequence) else records
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
    return _whole(answer, "chat.completion", choice, usage)


def text_completion(
    answer: Answer, text: bytes, reason: FinishReason, usage: Usage, records: Records = None
) -> dict[str, object]:
    logprobs = completion_logprobs(records, TextPlaces(text)) if isinstance(records, Sequence) else records
    choice = {"index": 0, "text": text.decode("utf-8", "replace"), "logprobs": logprobs, "finish_reason": reason}
    return _whole(answer, "text_completion", choice, usage)


def completion(
    answer: Answer, text: bytes, reason: FinishReason, usage: Usage, records: Records = None
) -> dict[str, object]:
    """The plain answer of either endpoint."""
    build = chat_completion if answer.endpoint == "chat" else text_completion
    return build(answer, text, reason, usage, records)


def _whole(answer: Answer, kind: str, choice: dict[str, object], usage: Usage) -> dict[str, object]:
    return {
        "id": answer.response_id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": None,
        "choices": [choice],
        "usage": usage.to_json(),
    }


def model_object(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "millrace"}


def model_list(names: list[str], created: int) -> dict[str, object]:
    return {"object": "list", "data": [model_object(name, created) for name in sorted(names)]}
