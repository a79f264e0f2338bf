"""Log lines: one event a line, for people or for programs, whatever is in their fields."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from bus.log import set_up_logging


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def logged(*, as_json: bool, **extra: object) -> str:
    """What one call writes."""
    stream = io.StringIO()
    set_up_logging("gateway", as_json=as_json, stream=stream)
    logging.getLogger("part").info("job finished", extra=extra)
    return stream.getvalue()


def test_a_text_line_has_time_level_role_message_and_fields() -> None:
    line = logged(as_json=False, job="c0-1", tokens_out=412, ttft_ms=83.21)

    assert line.split(" ", 1)[1] == "info    gateway: job finished  job=c0-1 tokens_out=412 ttft_ms=83.21\n"


def test_a_json_line_is_one_object_with_the_fields_beside_the_message() -> None:
    line = json.loads(logged(as_json=True, job="c0-1", tokens_out=412))

    assert line | {"time": ""} == {
        "time": "", "level": "info", "role": "gateway", "logger": "part",
        "message": "job finished", "job": "c0-1", "tokens_out": 412,
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("value", ["two\nlines", "\ud800", b"\xff\x00", {1: {2, 3}}, 2**70, object(), "\x1b[31m", ""])
def test_no_field_breaks_or_forges_a_line(value: object, as_json: bool) -> None:
    """Fields hold what strangers sent."""
    line = logged(as_json=as_json, value=value)

    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_a_crash_says_where() -> None:
    stream = io.StringIO()
    set_up_logging("worker", stream=stream)

    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger().exception("sequence failed")

    assert "test_log.py" in stream.getvalue()
    assert "ValueError: broken" in stream.getvalue()


def test_a_long_field_is_cut() -> None:
    assert len(logged(as_json=False, prompt="x" * 100_000)) < 3_000
