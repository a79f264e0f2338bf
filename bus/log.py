"""Logging for every process: stdlib `logging`, constant messages, data in fields.

`log.info("job finished", extra={"job": job.id, "tokens_out": 412})` becomes

    12:04:31.250 info  gateway: job finished  job=c0-1f.. tokens_out=412

or, with `log_json`, one JSON object a line. Lines go to stderr; `millrace up` adds the role's name and keeps the files.
"""

import datetime
import logging
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import orjson

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_FIELD_CHARS_MAX = 2_000  # a field is evidence, not a payload


def set_up_logging(role: str, *, level: str = "info", as_json: bool = False, stream: TextIO | None = None) -> None:
    """Route the root logger to one handler on `stream` (stderr). Called once, by a `__main__`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(role) if as_json else TextFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


class TextFormatter(logging.Formatter):
    """One line for people; control characters in fields are escaped, so that data cannot forge a line."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created)
        clock = f"{moment:%H:%M:%S}.{int(record.msecs):03d}"
        fields = "".join(f" {name}={_shown(value)}" for name, value in fields_of(record).items())
        line = f"{clock} {record.levelname.lower():<7} {self._role}: {record.getMessage()}"
        return line + (" " + fields if fields else "") + _trace_of(self, record)


class JsonFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        trace = _trace_of(self, record).lstrip("\n")
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: _plain(value) for name, value in fields_of(record).items()},
            **({"trace": trace} if trace else {}),
        }
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _trace_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    trace = "\n" + formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
    return trace + ("\n" + formatter.formatStack(record.stack_info) if record.stack_info else "")


def _plain(value: Any) -> Any:
    """Something that orjson takes; text that is no UTF-8 is made visible instead of refused."""
    if isinstance(value, bytes):
        return value[:_FIELD_CHARS_MAX].decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value[:_FIELD_CHARS_MAX].encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, int | float | bool) or value is None:
        return value if not isinstance(value, int) or abs(value) < 2**53 else str(value)
    return _plain(str(value))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(_plain(value))
    safe = text.isprintable() and " " not in text and text != ""
    return text if safe else repr(text)
