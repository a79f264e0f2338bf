"""OpenAI-style JSON bytes -> `ChatJob`, or a `BadRequest` that names the field. Pure.

Three doors use the same reader: `/v1/chat/completions` (also the `job` field of a plain producer's XADD),
`/v1/completions`, and the simple body of `/api/chat*`.

The rules, in one place:
- unknown fields are ignored; known ones are strictly typed (true is no number, 50.0 is no integer);
- every optional may be null, which means absent;
- a field that would change the answer and is not supported is refused by name unless it holds its neutral value:
  to ignore it in silence would be a wrong answer that looks right;
- text with NUL characters is refused: C-string engines cut there, so two nodes would see two different prompts.
  Lone surrogates and invalid UTF-8 never get past the JSON decoder, nor does nesting beyond 1024 levels.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
import orjson

from bus.ids import ModelName, is_model_name
from bus.jobs import (
    LOGPROBS_MAX,
    MAX_TOKENS_LIMIT,
    PROMPT_BYTES_MAX,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
    STOP_STRINGS_MAX,
    ChatJob,
    Message,
    Sampling,
)

MESSAGES_MAX = 8192
PARTS_MAX = 1024
NAME_CHARS_MAX = 256
STOP_BYTES_MAX = 1024
TOP_K_MAX = 1_000_000
COMPLETION_LOGPROBS_MAX = 5  # OpenAI's limit of that route
BIASES_MAX = 1024
TOKEN_ID_MAX = 10_000_000
SIMPLE_NEW_TOKENS_DEFAULT = 256
ROLES = ("system", "developer", "user", "assistant", "tool")

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

BadCode = Literal[
    "invalid_json",  # not JSON, or not an object at the top
    "missing_required_parameter",
    "invalid_type",
    "invalid_value",
    "unsupported_value",  # right type, but this server cannot do it (n=2, image parts, tools ...)
    "too_large",
]


class BadRequest(ValueError):
    """The caller's fault, and a retry of the same bytes never helps: HTTP 400, or a dead letter for a producer.

    field: as the caller wrote it (`messages[2].content`), None when the body as a whole is at fault.
    """

    def __init__(self, field: str | None, message: str, code: BadCode = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.message = message
        self.code: BadCode = code


class ParsedRequest(msgspec.Struct, frozen=True):
    """A job that can be run, and what only the front door needs to know about its answer."""

    job: ChatJob
    include_usage: bool = False  # stream_options.include_usage
    user: str = ""  # OpenAI's end-user label; for logs only


def parse_chat(body: bytes, default_model: str | None = None) -> ParsedRequest:
    """The body of `/v1/chat/completions`. Raises BadRequest and nothing else."""
    fields = _read_object(body)
    messages = _messages(fields)
    _refuse_unsupported(fields, _CHAT_NEUTRAL)
    limit = _max_tokens(fields, "max_completion_tokens", "max_tokens")
    return _assemble(fields, default_model, messages=messages, max_tokens=limit, logprobs=_chat_logprobs(fields))


def parse_completion(body: bytes, default_model: str | None = None) -> ParsedRequest:
    """The body of `/v1/completions`: raw text, continued as it stands. Raises BadRequest and nothing else."""
    fields = _read_object(body)
    prompt = _completion_prompt(fields)
    _refuse_unsupported(fields, _COMPLETION_NEUTRAL)
    limit = _max_tokens(fields, "max_tokens")
    # OpenAI's documented default of this route; chat has none.
    limit = 16 if limit is None else limit
    logprobs = _completion_logprobs(fields)
    return _assemble(fields, default_model, prompt=prompt, max_tokens=limit, logprobs=logprobs)


def parse_simple(body: bytes, default_model: str | None = None) -> ParsedRequest:
    """`{prompt, max_new_tokens, temperature?, top_p?, top_k?, model?, seed?, stop?}`: one user message.

    Raises BadRequest and nothing else.
    """
    fields = _read_object(body)
    prompt = _text(fields.get("prompt"), "prompt", required=True)
    if not prompt:
        raise BadRequest("prompt", "prompt must not be empty")
    limit = _max_tokens(fields, "max_new_tokens")
    sampling = _sampling(fields)
    job = ChatJob(
        model=_model(fields, default_model),
        messages=(Message(role="user", content=prompt),),
        max_tokens=SIMPLE_NEW_TOKENS_DEFAULT if limit is None else limit,
        sampling=sampling,
        stop=_stop(fields),
    )
    return ParsedRequest(job=job)


def _assemble(
    fields: Mapping[str, Any],
    default_model: str | None,
    *,
    messages: tuple[Message, ...] = (),
    prompt: str | None = None,
    max_tokens: int | None,
    logprobs: int | None,
) -> ParsedRequest:
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options", f"stream_options must be an object, not {kind_of(options)}", "invalid_type")
    job = ChatJob(
        model=_model(fields, default_model),
        messages=messages,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        stop=_stop(fields),
        stream=_flag(fields.get("stream"), "stream"),
        ignore_eos=_flag(fields.get("ignore_eos"), "ignore_eos"),
        logprobs=logprobs,
    )
    return ParsedRequest(
        job=job,
        include_usage=_flag((options or {}).get("include_usage"), "stream_options.include_usage"),
        user=_text(fields.get("user"), "user") or "",
    )


def _read_object(body: bytes) -> Mapping[str, Any]:
    if len(body) > PROMPT_BYTES_MAX:
        raise BadRequest(None, f"the body has {len(body)} bytes, the limit is {PROMPT_BYTES_MAX}", "too_large")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(None, f"the body is not valid JSON: {error}", "invalid_json") from error
    if not isinstance(fields, dict):
        raise BadRequest(None, f"the body must be a JSON object, not {kind_of(fields)}", "invalid_json")
    return fields


# --- messages and prompts ---------------------------------------------------------------------------------------


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    raw = fields.get("messages")
    if raw is None:
        raise BadRequest("messages", "messages is required", "missing_required_parameter")
    if not isinstance(raw, list):
        raise BadRequest("messages", f"messages must be a list, not {kind_of(raw)}", "invalid_type")
    if not raw:
        raise BadRequest("messages", "messages must not be empty")
    if len(raw) > MESSAGES_MAX:
        raise BadRequest("messages", f"messages has {len(raw)} entries, the limit is {MESSAGES_MAX}", "too_large")
    return tuple(_message(one, f"messages[{index}]") for index, one in enumerate(raw))


def _message(raw: Any, at: str) -> Message:
    if not isinstance(raw, dict):
        raise BadRequest(at, f"{at} must be an object, not {kind_of(raw)}", "invalid_type")
    role = _text(raw.get("role"), f"{at}.role", required=True)
    if role not in ROLES:
        raise BadRequest(f"{at}.role", f"{at}.role must be one of {', '.join(ROLES)}")
    name = _text(raw.get("name"), f"{at}.name", chars_max=NAME_CHARS_MAX)
    return Message(role=role, content=_content(raw, role, f"{at}.content", at), name=name)


def _content(raw: Mapping[str, Any], role: str, at: str, message_at: str) -> str:
    content = raw.get("content")
    if content is None:
        # An assistant turn that only called tools, or refused, carries no text.
        if role == "assistant" and any(raw.get(key) for key in ("tool_calls", "function_call", "refusal")):
            return _text(raw.get("refusal"), f"{message_at}.refusal") or ""
        raise BadRequest(at, f"{at} is required", "missing_required_parameter")
    if isinstance(content, str):
        return _clean(content, at)
    if isinstance(content, list):
        if len(content) > PARTS_MAX:
            raise BadRequest(at, f"{at} has {len(content)} parts, the limit is {PARTS_MAX}", "too_large")
        return "".join(_part(part, f"{at}[{index}]") for index, part in enumerate(content))
    raise BadRequest(at, f"{at} must be a string or a list of parts, not {kind_of(content)}", "invalid_type")


def _part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        raise BadRequest(at, f"{at} must be an object, not {kind_of(part)}", "invalid_type")
    kind = _text(part.get("type"), f"{at}.type", required=True)
    if kind in ("text", "refusal"):
        return _text(part.get(kind), f"{at}.{kind}", required=True) or ""
    raise BadRequest(at, f"{at} is of type {_shown(kind or '')}; only text is supported here", "unsupported_value")


def _completion_prompt(fields: Mapping[str, Any]) -> str:
    raw = fields.get("prompt")
    if isinstance(raw, list):
        if len(raw) != 1 or not isinstance(raw[0], str):
            message = "prompt must be one string; lists and token ids are not supported"
            raise BadRequest("prompt", message, "unsupported_value")
        raw = raw[0]
    prompt = _text(raw, "prompt", required=True)
    if not prompt:
        raise BadRequest("prompt", "prompt must not be empty")
    return prompt


# --- the other fields ---------------------------------------------------------------------------------------------


def _model(fields: Mapping[str, Any], default_model: str | None) -> ModelName:
    name = _text(fields.get("model"), "model")
    if name is None:
        if default_model is None:
            raise BadRequest("model", "model is required", "missing_required_parameter")
        name = default_model
    if not is_model_name(name):
        raise BadRequest("model", "model must be 1 to 128 characters of A-Z a-z 0-9 _ . / @ + : -")
    return ModelName(name)


def _max_tokens(fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of `names` that is set; all that are set must be valid."""
    limits = [_integer(fields.get(name), name, 1, MAX_TOKENS_LIMIT) for name in names]
    return next((limit for limit in limits if limit is not None), None)


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    top_p = _number(fields.get("top_p"), "top_p", 0.0, 1.0)
    if top_p == 0.0:
        raise BadRequest("top_p", "top_p must be above 0 and at most 1")
    return Sampling(
        temperature=_number(fields.get("temperature"), "temperature", 0.0, 2.0),
        top_p=top_p,
        top_k=_integer(fields.get("top_k"), "top_k", 0, TOP_K_MAX),
        seed=_integer(fields.get("seed"), "seed", _INT64_MIN, _INT64_MAX),
        min_p=_number(fields.get("min_p"), "min_p", 0.0, 1.0),
        presence_penalty=_number(fields.get("presence_penalty"), "presence_penalty", -2.0, 2.0) or None,
        frequency_penalty=_number(fields.get("frequency_penalty"), "frequency_penalty", -2.0, 2.0) or None,
        repetition_penalty=_number(
            fields.get("repetition_penalty"), "repetition_penalty", REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX
        ),
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """Token ids, as JSON's names are: texts. Which ids there are only the model knows."""
    raw = fields.get("logit_bias")
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise BadRequest("logit_bias", f"logit_bias must be an object, not {kind_of(raw)}", "invalid_type")
    if len(raw) > BIASES_MAX:
        raise BadRequest("logit_bias", f"logit_bias has {len(raw)} tokens, the limit is {BIASES_MAX}", "too_large")
    found: dict[int, float] = {}
    for name, value in raw.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) <= TOKEN_ID_MAX):
            raise BadRequest("logit_bias", f"logit_bias names {_shown(name)}, which is no token id")
        bias = _number(value, f"logit_bias.{int(name)}", -100.0, 100.0)
        if bias:
            found[int(name)] = bias
    return tuple(sorted(found.items()))


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    """How many likeliest tokens are shown beside each token; None: nothing is asked for."""
    asked = _flag(fields.get("logprobs"), "logprobs")
    top = _integer(fields.get("top_logprobs"), "top_logprobs", 0, LOGPROBS_MAX)
    if top and not asked:
        raise BadRequest("top_logprobs", "top_logprobs needs logprobs to be true")
    return (top or 0) if asked else None


def _completion_logprobs(fields: Mapping[str, Any]) -> int | None:
    """The older form: a number, and 0 asks for the chosen tokens alone. Some clients send false for nothing."""
    value = fields.get("logprobs")
    return None if value is False else _integer(value, "logprobs", 0, COMPLETION_LOGPROBS_MAX)


def _stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    raw = fields.get("stop")
    if raw is None:
        return ()
    many = raw if isinstance(raw, list) else [raw]
    if len(many) > STOP_STRINGS_MAX:
        raise BadRequest("stop", f"stop has {len(many)} strings, the limit is {STOP_STRINGS_MAX}", "too_large")
    found: list[str] = []
    for index, one in enumerate(many):
        at = f"stop[{index}]" if isinstance(raw, list) else "stop"
        text = _text(one, at, required=True) or ""
        if not text:
            raise BadRequest(at, f"{at} must not be empty")
        if len(text.encode()) > STOP_BYTES_MAX:
            raise BadRequest(at, f"{at} is longer than {STOP_BYTES_MAX} bytes", "too_large")
        if text not in found:
            found.append(text)
    return tuple(found)


# --- what is refused unless neutral -----------------------------------------------------------------------------

Neutral = Callable[[Any], bool]


def _false(value: Any) -> bool:
    return value is False


def _empty(value: Any) -> bool:
    return value in ([], {}, "")


def _is(*neutral: Any) -> Neutral:
    return lambda value: any(type(value) is type(one) and value == one for one in neutral)


_ZERO, _ONE = _is(0, 0.0), _is(1, 1.0)

_COMMON_NEUTRAL: Mapping[str, Neutral] = {
    "n": _ONE,
    "best_of": _ONE,
    "length_penalty": _ONE,
    "typical_p": _ONE,
    "min_tokens": _ZERO,
    "use_beam_search": _false,
    "stop_token_ids": _empty,
    "bad_words": _empty,
    "include_stop_str_in_output": _false,
    "skip_special_tokens": _is(True),
    "prompt_logprobs": _false,
    "echo": _false,
    "guided_json": _empty,
    "guided_regex": _empty,
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "grammar": _empty,
    "json_schema": _empty,
    "structured_outputs": _empty,
}

_CHAT_NEUTRAL: Mapping[str, Neutral] = {
    **_COMMON_NEUTRAL,
    "tools": _empty,
    "functions": _empty,
    "tool_choice": _is("none", "auto"),
    "function_call": _is("none", "auto"),
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "modalities": _is(["text"]),
    "audio": _empty,
    "web_search_options": lambda value: False,
    "add_generation_prompt": _is(True),
    "continue_final_message": _false,
    "documents": _empty,
    "chat_template": lambda value: False,
    "chat_template_kwargs": _empty,
}

_COMPLETION_NEUTRAL: Mapping[str, Neutral] = {
    **_COMMON_NEUTRAL,
    "suffix": _empty,
    "response_format": _CHAT_NEUTRAL["response_format"],
}


def _refuse_unsupported(fields: Mapping[str, Any], neutral: Mapping[str, Neutral]) -> None:
    # A tool list that may not be used changes nothing.
    tools_off = fields.get("tool_choice") == "none"
    # A request has a handful of fields, the table dozens.
    for name, value in fields.items():
        is_neutral = neutral.get(name)
        if is_neutral is None or value is None or is_neutral(value) or (name == "tools" and tools_off):
            continue
        raise BadRequest(name, f"{name} is not supported here with this value", "unsupported_value")


# --- typed readers ------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[^\x20-\x7e]")


def kind_of(value: object) -> str:
    """What a JSON value is, in the words of an error message."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _shown(text: str) -> str:
    """A caller's own word, safe to repeat in an error."""
    return repr(_CONTROL.sub("?", text[:40]))


def _clean(text: str, at: str) -> str:
    if "\0" in text:
        raise BadRequest(at, f"{at} contains a NUL character (\\u0000)")
    return text


def _text(value: Any, at: str, *, required: bool = False, chars_max: int | None = None) -> str | None:
    if value is None:
        if required:
            raise BadRequest(at, f"{at} is required", "missing_required_parameter")
        return None
    if not isinstance(value, str):
        raise BadRequest(at, f"{at} must be a string, not {kind_of(value)}", "invalid_type")
    if chars_max is not None and len(value) > chars_max:
        raise BadRequest(at, f"{at} is longer than {chars_max} characters", "too_large")
    return _clean(value, at)


def _flag(value: Any, at: str) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadRequest(at, f"{at} must be a boolean, not {kind_of(value)}", "invalid_type")
    return value


def _integer(value: Any, at: str, least: int, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        # The decoder turns integers beyond 64 bits into floats: they are out of range, not of the wrong type.
        if isinstance(value, float) and value.is_integer() and not least <= value <= most:
            raise BadRequest(at, f"{at} must be between {least} and {most}")
        what = "a number with a fraction or exponent" if isinstance(value, float) else kind_of(value)
        raise BadRequest(at, f"{at} must be an integer, not {what}", "invalid_type")
    if not least <= value <= most:
        raise BadRequest(at, f"{at} must be between {least} and {most}")
    return value


def _number(value: Any, at: str, least: float, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(at, f"{at} must be a number, not {kind_of(value)}", "invalid_type")
    if not least <= value <= most:
        raise BadRequest(at, f"{at} must be between {least:g} and {most:g}")
    return float(value)
