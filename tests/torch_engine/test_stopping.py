"""Stop strings never leak, not even in part."""

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.torch_engine.stopping import StopScanner

ALPHABET = st.text("ab\n", max_size=4)


def show(stops: list[str], parts: list[str]) -> tuple[list[str], bool]:
    scanner = StopScanner(stops)
    shown = [scanner.feed(part) for part in parts]
    return ([*shown, scanner.finish()], scanner.stopped)


def test_text_before_the_stop_string_is_shown_and_nothing_after() -> None:
    assert show(["END"], ["one E", "N", "D two"]) == (["one ", "", "", ""], True)


def test_what_only_looked_like_a_stop_string_is_shown_once_that_is_clear() -> None:
    assert show(["END"], ["one E", "N", "G"]) == (["one ", "", "ENG", ""], False)


def test_a_held_tail_is_shown_at_the_end_of_the_answer() -> None:
    assert show(["END"], ["one EN"]) == (["one ", "EN"], False)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert show(["three", "two"], ["one two three"]) == (["one ", ""], True)


def test_an_empty_stop_string_stops_nothing() -> None:
    assert show([""], ["text"]) == (["text", ""], False)


def test_a_stop_string_that_begins_in_shown_text_ends_the_answer_once_it_is_whole() -> None:
    """What was shown cannot be taken back; what an unbroken answer would not have shown does not follow it."""
    scanner = StopScanner(["END"], shown="one EN")

    assert (scanner.held, scanner.feed("D two"), scanner.stopped) == ("", "", True)


def test_what_only_looked_like_a_stop_string_is_shown_once() -> None:
    scanner = StopScanner(["ENDED", "DO"], shown="one EN")

    assert [scanner.feed(part) for part in ("D", "G", "D")] == ["", "DG", ""]
    assert (scanner.held, scanner.finish()) == ("D", "D")


def test_shown_text_with_a_whole_stop_string_ends_at_once() -> None:
    assert StopScanner(["END"], shown="one END two").stopped


@given(st.lists(ALPHABET.filter(bool), min_size=1, max_size=3), ALPHABET, st.lists(ALPHABET, max_size=12))
def test_behind_shown_text_comes_what_an_unbroken_answer_shows_behind_it(
    stops: list[str], shown: str, parts: list[str]
) -> None:
    whole, resumed = StopScanner(stops), StopScanner(stops, shown=shown)
    text = whole.feed(shown)
    more = ""
    for part in parts:
        text, more = text + whole.feed(part), more + resumed.feed(part)
        assert whole.stopped == resumed.stopped
        assert len(shown + more) == max(len(shown), len(text))
    text, more = text + whole.finish(), more + resumed.finish()

    assert (shown + more).startswith(text)
    assert len(shown + more) == max(len(shown), len(text))


@given(st.lists(ALPHABET.filter(bool), min_size=1, max_size=3), st.lists(ALPHABET, max_size=12))
def test_pieces_together_are_the_text_up_to_the_first_stop_string(stops: list[str], parts: list[str]) -> None:
    """However the text is cut, and at no moment is anything shown that a stop string swallows later."""
    scanner = StopScanner(stops)
    shown = seen = ""
    for part in parts:
        if not scanner.stopped:
            seen += part
        shown += scanner.feed(part)
        cuts = [at for stop in stops if (at := seen.find(stop)) >= 0]
        assert scanner.stopped == bool(cuts)
        assert shown == seen[: min(cuts)] if cuts else seen.startswith(shown)
    shown += scanner.finish()

    cuts = [at for stop in stops if (at := seen.find(stop)) >= 0]
    assert shown == (seen[: min(cuts)] if cuts else seen)
