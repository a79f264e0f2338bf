"""The fold from out-stream entries to one answer: no gap, no repeat, one end, whatever the order of misfortunes."""

from hypothesis import given
from hypothesis import strategies as st

from bus.calls.following import Ended, Following, Hole

DONE = Ended(state="done", reason="stop", new_tokens=3)


def streaming(fence: str = "1.a", text_len: int = 0) -> Following:
    job = Following(streamed=True)
    job.marker(fence, text_len)
    return job


def test_frames_of_the_current_attempt_add_up_to_the_answer() -> None:
    job = streaming()

    job.frame("1.a", 0, b"Hel")
    job.frame("1.a", 3, b"lo")
    job.end("1.a", 5, DONE, None)

    assert bytes(job.text) == b"Hello"
    assert job.ended == DONE


def test_a_frame_of_an_attempt_that_was_replaced_is_dropped() -> None:
    job = streaming()
    job.frame("1.a", 0, b"Hel")

    job.marker("2.b", 3)
    job.frame("1.a", 3, b"XXX")
    job.frame("2.b", 3, b"lo")

    assert bytes(job.text) == b"Hello"


def test_repeated_bytes_are_compared_and_kept_once() -> None:
    job = streaming()
    job.frame("1.a", 0, b"Hello")

    job.marker("2.b", 0)
    job.frame("2.b", 0, b"Hel")
    job.frame("2.b", 3, b"lo you")

    assert bytes(job.text) == b"Hello you"
    assert job.ended is None


def test_a_different_byte_below_what_was_shown_interrupts_the_answer() -> None:
    """Never a silent divergence."""
    job = streaming()
    job.frame("1.a", 0, b"Hello")

    job.marker("2.b", 0)
    job.frame("2.b", 0, b"Hexxo")

    assert job.ended is not None
    assert job.ended.reason == "interrupted"
    assert bytes(job.text) == b"Hello"


def test_a_frame_beyond_what_is_known_asks_for_the_bytes_between() -> None:
    job = streaming()
    job.frame("1.a", 0, b"He")

    job.frame("1.a", 4, b"o")

    assert job.hole() == Hole("1.a", 2, 5)
    assert job.filled(Hole("1.a", 2, 5), b"llo")
    assert bytes(job.text) == b"Hello"
    assert job.hole() is None


def test_an_end_waits_until_its_text_is_whole() -> None:
    job = streaming()
    job.frame("1.a", 0, b"He")

    job.end("1.a", 5, DONE, None)

    assert job.ended is None
    hole = job.hole()
    assert hole == Hole("1.a", 2, 5)
    job.filled(hole, b"llo")
    assert job.ended == DONE


def test_a_marker_further_on_than_what_was_shown_is_a_hole() -> None:
    """The frames in between went to a gateway that is gone, or were lost with the server's last second."""
    job = streaming("2.b", text_len=4)

    assert job.hole() == Hole("2.b", 0, 4)


def test_the_first_end_wins() -> None:
    job = streaming()
    job.end("1.a", 0, DONE, None)

    job.end("2.b", 9, Ended(state="failed", reason="deadline"), None)
    job.frame("1.a", 0, b"late")

    assert job.ended == DONE
    assert bytes(job.text) == b""


def test_an_answer_that_was_not_streamed_comes_with_its_end() -> None:
    job = Following(streamed=False)
    job.marker("1.a", 0)
    job.frame("1.a", 0, b"ignored")

    job.end("1.a", 5, DONE, b"Hello")

    assert bytes(job.text) == b"Hello"
    assert job.ended == DONE


def test_a_stored_answer_shorter_than_what_was_shown_is_said() -> None:
    job = streaming()
    job.frame("1.a", 0, b"Hello")

    job.end("2.b", 2, DONE, None)

    assert job.ended is not None
    assert job.ended.reason == "interrupted"


def test_nothing_read_for_a_hole_is_reported() -> None:
    job = streaming("2.b", text_len=4)

    assert not job.filled(Hole("2.b", 0, 4), b"")
    assert job.ended is None


@given(
    st.binary(min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=40),
)
def test_any_deliveries_of_the_same_text_end_in_that_text(
    answer: bytes, deliveries: list[tuple[int, int, bool]]
) -> None:
    """Frames repeated, cut anywhere, lost or reordered, attempts begun anew: the bytes come out once and in order."""
    job = streaming("1.0")
    attempt = 0
    for start, size, dies in deliveries:
        if dies:
            attempt += 1
            job.marker(f"{attempt}.0", min(start, len(answer)))
        offset = min(start, len(answer))
        job.frame(job.fence, offset, answer[offset : offset + size])
        assert answer.startswith(bytes(job.text))
    job.end(job.fence, len(answer), DONE, None)
    hole = job.hole()
    if hole is not None:
        job.filled(hole, answer[hole.start : hole.end])
    assert bytes(job.text) == answer
    assert job.ended == DONE
