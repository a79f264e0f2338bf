"""What a client has been shown stands: it is neither repeated nor contradicted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.relay_engine.answer import BYTES_PER_TOKEN_MAX, Answer
from gpu_worker.relay_engine.faults import Diverged


def fresh(*stop: str, max_tokens: int | None = None) -> Answer:
    return Answer(b"", stop, max_tokens, again=False)


def again(shown: str, *stop: str) -> Answer:
    return Answer(shown.encode(), stop, None, again=True)


def test_text_passes_as_it_comes_and_the_offset_counts_its_bytes() -> None:
    answer = fresh()

    assert [answer.feed("a"), answer.feed("ü"), answer.finish()] == [b"a", "ü".encode(), b""]
    assert answer.offset == 3


def test_a_continued_answer_begins_where_the_last_attempt_ended() -> None:
    answer = Answer(b"Hello", (), None, again=False)

    assert answer.feed(" world") == b" world"
    assert answer.offset == 11


def test_a_repeated_answer_is_swallowed_while_it_equals_what_was_shown() -> None:
    answer = again("Hello wor")

    assert [answer.feed("Hel"), answer.feed("lo w"), answer.feed("orld"), answer.feed("!")] == [b"", b"", b"ld", b"!"]
    assert answer.offset == len("Hello world!")


@pytest.mark.parametrize("said", ["Jello", "Hello wird", "H\0"])
def test_the_first_different_byte_interrupts(said: str) -> None:
    with pytest.raises(Diverged):
        again("Hello world").feed(said)


def test_a_repeated_answer_that_ends_early_interrupts_too() -> None:
    answer = again("Hello world")
    answer.feed("Hello")

    with pytest.raises(Diverged):
        answer.finish()


def test_a_repeated_answer_that_ends_exactly_there_adds_nothing() -> None:
    answer = again("Hello")

    assert (answer.feed("Hello"), answer.finish(), answer.offset) == (b"", b"", 5)


def test_a_stop_string_ends_the_answer_before_it() -> None:
    answer = fresh("END", "\n\n")

    assert answer.feed("one\n\ntwo END") == b"one"
    assert answer.ended == "stop"
    assert (answer.feed("more"), answer.finish()) == (b"", b"")


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    answer = fresh("END")

    assert [answer.feed("an E"), answer.feed("N"), answer.feed("T"), answer.feed(" E"), answer.finish()] == [
        b"an ",
        b"",
        b"ENT",
        b" ",
        b"E",
    ]


def test_a_node_that_ignores_max_tokens_is_cut_on_a_whole_character() -> None:
    answer = fresh(max_tokens=1)

    text = answer.feed("ü" * 1000)

    assert answer.ended == "length"
    assert len(text) <= BYTES_PER_TOKEN_MAX and text.decode() == "ü" * (BYTES_PER_TOKEN_MAX // 2)


@given(st.text("abü", max_size=30), st.lists(st.text("abü", min_size=1, max_size=3), max_size=2), st.data())
def test_however_a_text_is_cut_its_stops_are_found_and_nothing_leaks(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    shown = data.draw(st.integers(0, len(text)))
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    # A stop string may complete in one piece although an earlier, longer one is still open: the earliest end decides.
    if any(stop in text[:shown] for stop in stops) or found:
        shown = 0

    answer = again(text[:shown], *stops)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    new = b"".join([answer.feed(piece) for piece in pieces] + [answer.finish()])

    published = text[:shown] + new.decode()
    assert text.startswith(published)
    assert not any(stop in published for stop in stops)
    assert published == text or found
