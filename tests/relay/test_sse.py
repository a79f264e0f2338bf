"""Event streams of real servers differ in line ends, comments and manners; the parser must not care."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.relay_engine.faults import NodeBroke
from gpu_worker.relay_engine.sse import SseParser


def parse(*chunks: bytes, close: bool = True) -> list[str]:
    parser = SseParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return events + (parser.close() if close else [])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_three_line_ends_end_lines_and_events(end: bytes) -> None:
    assert parse(b"data: a" + end * 2 + b"data: b" + end * 2, close=False) == ["a", "b"]


def test_a_line_feed_that_follows_a_carriage_return_in_the_next_read_belongs_to_it() -> None:
    assert parse(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n", close=False) == ["a\nb"]


def test_an_empty_line_after_a_split_cr_lf_still_ends_the_event() -> None:
    assert parse(b"data: a\r", b"\n", b"\n", close=False) == ["a"]


def test_several_data_lines_are_one_event() -> None:
    assert parse(b'data: {"a":\ndata: 1}\n\n') == ['{"a":\n1}']


def test_comments_other_fields_and_empty_events_are_passed_over() -> None:
    assert parse(b": ping\n\nevent: x\nid: 4\nretry: 5\n\ndata: a\nunknown\n\n") == ["a"]


def test_only_one_space_after_the_colon_belongs_to_the_field() -> None:
    assert parse(b"data:a\n\ndata:  b\n\n") == ["a", " b"]


def test_a_character_split_over_two_reads_is_whole() -> None:
    raw = "data: 水車\n\n".encode()

    assert parse(raw[:8], raw[8:10], raw[10:]) == ["水車"]


def test_a_last_event_without_its_empty_line_is_delivered_at_the_end() -> None:
    assert parse(b"data: a\n\ndata: [DONE]") == ["a", "[DONE]"]


def test_a_byte_order_mark_is_dropped() -> None:
    assert parse(b"\xef\xbb\xbfdata: a\n\n") == ["a"]


def test_invalid_utf8_is_the_nodes_fault() -> None:
    with pytest.raises(NodeBroke, match="UTF-8"):
        parse(b"data: \xff\n\n")


@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 60, b"data: " + b"x" * 20 + b"\n", b"x" * 60])
def test_an_event_without_end_is_cut_off(chunk: bytes) -> None:
    parser = SseParser(event_bytes_max=50)

    def feed_for_ever() -> None:
        for _ in range(10):
            parser.feed(chunk)

    with pytest.raises(NodeBroke, match="more than 50"):
        feed_for_ever()


def test_comments_may_go_on_for_ever() -> None:
    parser = SseParser(event_bytes_max=50)

    for _ in range(100):
        assert parser.feed(b": ping\n\n") == []


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=9), max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.data(),
)
def test_where_the_network_cuts_the_stream_changes_nothing(texts: list[str], end: bytes, data: st.DataObject) -> None:
    raw = b"".join(b"data: " + text.encode() + end * 2 for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))

    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    assert parse(*chunks) == texts
