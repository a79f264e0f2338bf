"""What can go wrong with a node, and whose fault it is. Pure."""

from typing import Literal, NamedTuple

import orjson

MESSAGE_CHARS_MAX = 300

_CONTEXT_WORDS = (
    "context_length_exceeded",
    "maximum context length",
    "exceed_context_size",
    "context size",
    "context window",
)

_RATE_WORDS = ("rate_limit", "rate limit", "too many requests")

# The request itself is at fault only in these; every other status means that this node cannot do what it registered
# for (401: it wants a key; 404: another model; 429: full), and another node may.
_CLIENT_STATUSES = frozenset({400, 413, 422})


class CallFailed(Exception):
    """A call ended without an answer. `fault` is "client": no node could do it; "node": another one may.

    status: the HTTP status that said so, 0 if there was none. minds_logprobs: the node refuses to give any.
    """

    def __init__(
        self,
        code: str,
        message: str,
        fault: Literal["", "client", "node"] = "node",
        status: int = 0,
        *,
        minds_logprobs: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fault: Literal["", "client", "node"] = fault
        self.status = status
        self.minds_logprobs = minds_logprobs


class NodeSilent(CallFailed):
    """A bound on waiting passed."""

    def __init__(self, message: str) -> None:
        super().__init__("node_silent", message)


class NodeBroke(CallFailed):
    """No connection, or an answer that breaks off or makes no sense."""

    def __init__(self, message: str) -> None:
        super().__init__("node_error", message)


class Diverged(CallFailed):
    """The node says something else than what the client has been shown already: said to the client, never retried."""

    def __init__(self) -> None:
        message = "the node that streamed this answer was lost, and another one continues it with different text"
        super().__init__("interrupted", message, fault="")


class NoLogprobs(CallFailed):
    """The request asks for log probabilities, and the node gives none, or none that make sense, or refuses to."""

    def __init__(self, message: str = "the node gives no log probabilities", status: int = 0) -> None:
        super().__init__("unsupported", message, fault="", status=status)


def no_logprobs(failure: CallFailed) -> NoLogprobs | None:
    """What says that the node gives none: as it is, or in the node's own words. For a job that asks for some."""
    if isinstance(failure, NoLogprobs):
        return failure
    if failure.minds_logprobs:
        return NoLogprobs(failure.message, failure.status)
    return None


def sanitise(text: str) -> str:
    """A node's own words in a form that may go into logs, errors and JSON: one short printable line."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * MESSAGE_CHARS_MAX])
    line = " ".join(printable.split())
    return line if len(line) <= MESSAGE_CHARS_MAX else line[: MESSAGE_CHARS_MAX - 3] + "..."


class Said(NamedTuple):
    """What an error body says, each "" if it does not. param: what of the request it minds."""

    message: str = ""
    code: str = ""
    param: str = ""


def read_error(body: bytes) -> Said:
    """An error body in any of the shapes in the field.

    `{"error": {"message", "code", "param"}}` OpenAI; `{"error": "..."}` Ollama, TGI; `{"message", "param"}` FastChat,
    older vLLM; `{"detail"}` FastAPI, whose detail may be a list.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Said()
    return error_of(found)


def error_of(found: object) -> Said:
    if not isinstance(found, dict):
        return Said()
    error = found.get("error")
    if isinstance(error, dict):
        # llama.cpp: an integer as code, and a telling type.
        code = next((one for one in (error.get("code"), error.get("type")) if isinstance(one, str)), "")
        return Said(sanitise(str(error.get("message") or "")), code, _text(error.get("param")))
    for key in ("error", "message", "detail"):
        if isinstance(found.get(key), str):
            return Said(sanitise(found[key]), "", _text(found.get("param")))
    if isinstance(detail := found.get("detail"), list):
        return Said(sanitise(orjson.dumps(detail).decode()), "", " ".join(map(_minded, detail)))
    return Said()


def _minded(one: object) -> str:
    """What a validation error of FastAPI is about: not its `input`, which may be the whole request."""
    if not isinstance(one, dict):
        return _text(one)
    place = one.get("loc")
    return " ".join(map(_text, [*(place if isinstance(place, list) else ()), one.get("msg")]))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def minds_logprobs(said: Said) -> bool:
    """Whether log probabilities are what a refusal is about. A message may echo the whole request: it counts only
    where the node names no field."""
    if said.param:
        return "logprob" in said.param.lower()
    words = f"{said.code} {said.message}".lower()
    return "logprob" in words and not any(word in words for word in _RATE_WORDS)


def failure_of_status(status: int, body: bytes) -> CallFailed:
    """What an HTTP status other than 200 means for the job."""
    said = read_error(body)
    message = said.message
    if status in _CLIENT_STATUSES:
        words = f"{said.code} {message}".lower()
        if any(word in words for word in _CONTEXT_WORDS):
            return CallFailed("context_length_exceeded", message or "the prompt is too long", "client", status)
        reason = message or f"the node refused the request ({status})"
        return CallFailed("bad_request", reason, "client", status, minds_logprobs=minds_logprobs(said))
    ending = f": {message}" if message else ""
    return CallFailed("node_error", f"the node answered HTTP {status}{ending}", status=status)


def failure_of_event(found: object) -> CallFailed:
    """An error that arrives inside a stream that began with 200."""
    message, code, _ = error_of(found)
    if "context_length" in code:
        return CallFailed("context_length_exceeded", message or "the prompt is too long", fault="client")
    return CallFailed("node_error", f"the node reported an error{': ' + message if message else ''}")
