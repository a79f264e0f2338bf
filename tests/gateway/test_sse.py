"""Events on the wire, and the ids that bring a client back to where it was."""

import orjson
import pytest

from bus.ids import JobId
from gateway.sse import PING, data_event, event_id, parse_event_id


def test_an_event_is_one_data_line_and_a_blank_line() -> None:
    assert data_event(b'{"a":1}') == b'data: {"a":1}\n\n'


def test_an_event_with_an_id_names_it_first() -> None:
    assert data_event(b"{}", event_id(JobId("c0-x"), 17)) == b"id: c0-x.17\ndata: {}\n\n"


def test_text_with_line_breaks_stays_on_its_data_line() -> None:
    assert data_event(orjson.dumps("a\nb\r\nc")).count(b"\n") == 2


@pytest.mark.parametrize("job", ["c0-abc", "c12-own.id.with.dots", "c3-a_b-c"])
@pytest.mark.parametrize("offset", [0, 7, 123456])
def test_an_id_is_read_back_as_written(job: str, offset: int) -> None:
    assert parse_event_id(event_id(JobId(job), offset).decode()) == (job, offset)


@pytest.mark.parametrize(
    "text", ["", "x", "c0-abc", "c0-abc.", "c0-abc.-1", "c0-abc.1e3", ".5", "c0-a b.5", "c0-abc.٣", "c0-a." + "9" * 13]
)
def test_foreign_ids_are_nobodys(text: str) -> None:
    assert parse_event_id(text) is None


def test_a_ping_is_a_comment_line_and_ends_no_event() -> None:
    """openai-python dispatches an event with empty data at any blank line after the first id, and fails to parse it."""
    assert PING.startswith(b":")
    assert PING.count(b"\n") == 1
