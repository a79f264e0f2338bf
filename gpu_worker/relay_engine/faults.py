"""What can go wrong with a node, and whose fault it is. Pure."""

from typing import Literal

import orjson

MESSAGE_CHARS_MAX = 300

_CONTEXT_WORDS = (
    "context_length_exceeded",
    "maximum context length",
    "exceed_context_size",
    "context size",
    "context window",
)

# The request itself is at fault only in these; every other status means that this node cannot do what it registered
# for (401: it wants a key; 404: another model; 429: full), and another node may.
_CLIENT_STATUSES = frozenset({400, 413, 422})


class CallFailed(Exception):
    """A call ended without an answer. `fault` is "client": no node could do it; "node": another one may.

    status: the HTTP status that said so, 0 if there was none.
    """

    def __init__(self, code: str, message: str, fault: Literal["", "client", "node"] = "node", status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fault: Literal["", "client", "node"] = fault
        self.status = status


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
    if failure.fault == "client" and "logprob" in failure.message.lower():
        return NoLogprobs(failure.message, failure.status)
    return None


def sanitise(text: str) -> str:
    """A node's own words in a form that may go into logs, errors and JSON: one short printable line."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * MESSAGE_CHARS_MAX])
    line = " ".join(printable.split())
    return line if len(line) <= MESSAGE_CHARS_MAX else line[: MESSAGE_CHARS_MAX - 3] + "..."


def read_error(body: bytes) -> tuple[str, str]:
    """(message, code) of an error body in any of the shapes in the field; ("", "") if there is none.

    `{"error": {"message", "code"}}` OpenAI; `{"error": "..."}` Ollama, TGI; `{"message"}` FastChat; `{"detail"}`
    FastAPI, whose detail may be a list.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    return error_of(found)


def error_of(found: object) -> tuple[str, str]:
    if not isinstance(found, dict):
        return "", ""
    error = found.get("error")
    if isinstance(error, dict):
        # llama.cpp: an integer as code, and a telling type.
        code = next((one for one in (error.get("code"), error.get("type")) if isinstance(one, str)), "")
        return sanitise(str(error.get("message") or "")), code
    for key in ("error", "message", "detail"):
        if isinstance(found.get(key), str):
            return sanitise(found[key]), ""
    if isinstance(found.get("detail"), list):
        return sanitise(orjson.dumps(found["detail"]).decode()), ""
    return "", ""


def failure_of_status(status: int, body: bytes) -> CallFailed:
    """What an HTTP status other than 200 means for the job."""
    message, code = read_error(body)
    if status in _CLIENT_STATUSES:
        words = f"{code} {message}".lower()
        if any(word in words for word in _CONTEXT_WORDS):
            return CallFailed("context_length_exceeded", message or "the prompt is too long", "client", status)
        return CallFailed("bad_request", message or f"the node refused the request ({status})", "client", status)
    said = f": {message}" if message else ""
    return CallFailed("node_error", f"the node answered HTTP {status}{said}", status=status)


def failure_of_event(found: object) -> CallFailed:
    """An error that arrives inside a stream that began with 200."""
    message, code = error_of(found)
    if "context_length" in code:
        return CallFailed("context_length_exceeded", message or "the prompt is too long", fault="client")
    return CallFailed("node_error", f"the node reported an error{': ' + message if message else ''}")
