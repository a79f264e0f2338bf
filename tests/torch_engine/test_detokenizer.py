"""Token by token must read like all at once."""

import random

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.torch_engine.detokenizer import TextStream, byte_fallback_bytes, byte_level_bytes
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
