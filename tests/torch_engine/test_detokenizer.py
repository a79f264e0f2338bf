"""Token by token must read like all at once."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from gpu_worker.torch_engine.detokenizer import TextStream, byte_fallback_bytes, byte_level_bytes
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.tiny import SPECIAL, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TABLE = byte_level_bytes(TOKENIZER.get_vocab(with_added_tokens=True), plain=(), hidden=range(len(SPECIAL)))
SAMPLES = (
    "plain text",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "مرحبا",
    "a\u0301 e\u0301",
    "\x00\x7f\t\n",
    "\U0010ffff\ufffd",
)


def pieces(tokens: list[int]) -> list[str]:
    stream = TextStream(TABLE, ())
    return [*(stream.feed(token) for token in tokens), stream.finish()]


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=60))
def test_any_tokens_read_as_the_tokenizer_reads_them(tokens: list[int]) -> None:
    """Half characters and bytes that are no UTF-8 included."""
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    silent = any(special in text for special in SPECIAL)

    assert silent or "".join(pieces(tokens)) == text


def test_thousands_of_random_strings_come_back() -> None:
    chance = random.Random(5)
    for _ in range(3000):
        text = "".join(chance.choice(SAMPLES)[: chance.randrange(1, 8)] for _ in range(chance.randrange(1, 6)))
        tokens = TOKENIZER.encode(text, add_special_tokens=False).ids

        assert "".join(pieces(tokens)) == text


def test_no_piece_ends_within_a_character() -> None:
    tokens = TOKENIZER.encode("日👩‍👧", add_special_tokens=False).ids

    shown = [piece for piece in pieces(tokens) if piece]

    assert "�" not in "".join(shown)
    assert shown[0] == "日"


def test_an_unfinished_character_at_the_end_is_said_to_be_one() -> None:
    tokens = TOKENIZER.encode("a日", add_special_tokens=False).ids[:-1]

    assert "".join(pieces(tokens)) == "a�"


def test_a_token_beyond_the_vocabulary_has_no_text() -> None:
    """Heads are often padded to a round number of rows."""
    assert pieces([10**6]) == ["", ""]


def test_byte_fallback_tokens_are_bytes_and_the_mark_is_a_space() -> None:
    table = byte_fallback_bytes({"<s>": 0, "▁the": 1, "<0xE6>": 2, "<0x97>": 3, "<0xA5>": 4}, hidden=(0,))

    stream = TextStream(table, ())

    assert "".join(stream.feed(token) for token in (0, 1, 2, 3, 4)) == " the日"


ALPHABET = (
    *(
        "plain ",
        "text\n",
        "  ",
        "don't",
        "3.14",
        "naïve",
        "ß",
        "Ωλ",
        "привет",
        "日本",
        "語",
        "한국어",
        "ไทย",
        "हिन्दी",
        "مرحبا",
        "עברית",
    ),
    *(
        "a\u0301",
        "n\u0303\u0323",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇫🇷",
        "\u200d",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x7f",
        "\r\n",
        "\t",
        "\U0010ffff",
    ),
)


def random_text(chance: random.Random) -> str:
    return "".join(chance.choice(ALPHABET) for _ in range(chance.randrange(1, 12)))


@pytest.fixture(scope="module")
def text_model(real_model_dir: Path) -> TextModel:
    return TextModel(real_model_dir)


def test_thousands_of_texts_come_back_through_the_default_models_tokenizer(text_model: TextModel) -> None:
    chance = random.Random(8)
    for _ in range(2000):
        text = random_text(chance)
        tokens = text_model.encode(text, special=False)
        stream = TextStream(text_model.token_bytes, ())

        shown = [stream.feed(token) for token in tokens]

        assert "".join(shown) + stream.finish() == text == text_model.tokenizer.decode(tokens)


def test_what_is_shown_is_never_taken_back(text_model: TextModel) -> None:
    """Any tokens, cut anywhere: at each moment the shown text begins the whole, and ends with a whole character."""
    chance = random.Random(9)
    byte_tokens = [token for token, raw in enumerate(text_model.token_bytes) if raw and raw[0] >= 0x80]
    for _ in range(1500):
        tokens = [chance.choice((chance.choice(byte_tokens), chance.randrange(17, 49152))) for _ in range(10)]
        whole = b"".join(text_model.token_bytes[token] for token in tokens).decode(errors="replace")
        stream, shown = TextStream(text_model.token_bytes, ()), ""
        for token in tokens:
            shown += stream.feed(token)
            assert whole.startswith(shown)
        assert shown + stream.finish() == whole == text_model.tokenizer.decode(tokens)


def test_a_stop_string_never_leaks_however_tokens_cut_it(text_model: TextModel) -> None:
    """It may begin and end within tokens. Of several the one that is whole first ends the answer."""
    chance = random.Random(10)
    stopped = 0
    for _ in range(1500):
        text = random_text(chance)
        begin = chance.randrange(len(text))
        stops = [text[begin : begin + chance.randrange(1, 6)], random_text(chance)]
        stream, shown = TextStream(text_model.token_bytes, stops), ""
        plain, seen = TextStream(text_model.token_bytes, ()), ""
        for token in text_model.encode(text, special=False):
            shown += stream.feed(token)
            seen += plain.feed(token)
            places = [seen.find(stop) for stop in stops if stop in seen]
            assert stream.stopped == bool(places)
            if places:
                assert shown == seen[: min(places)]
                break
            assert seen.startswith(shown)
        shown += stream.finish()
        stopped += stream.stopped
        assert not any(stop in shown for stop in stops)
        assert stream.stopped or shown == text
    assert stopped == 1500


def test_special_tokens_have_no_text_and_other_added_ones_stand_as_written() -> None:
    """A letter of an added token is itself, where the byte alphabet would read it as a byte."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool é>", special=False), AddedToken("é", special=False)])
    tokenizer.add_special_tokens([AddedToken("<hidden>", special=True)])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    plain, hidden = (vocabulary["<tool é>"], vocabulary["é"]), (vocabulary["<hidden>"],)
    stream = TextStream(byte_level_bytes(vocabulary, plain, hidden), ())

    shown = "".join(stream.feed(token) for token in (*hidden, *plain))

    assert shown == "<tool é>é"
