"""Long prompts: the same tokens, without stopping anybody, and no longer than it takes to see that they do not fit."""

import threading
import time

import pytest

from gpu_worker.torch_engine.tokenizing import SLICE_CHARS, encode, hopeless
from tests.torch_engine.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = (
    "",
    "plain text",
    "日本語のテキスト 👩‍👩‍👧‍👦",
    "1234567890" * 50,
    "a\x00b\r\n  c",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_those_of_the_tokenizer(text: str, special: bool):
    assert encode(TOKENIZER, text, special=special) == TOKENIZER.encode(text, add_special_tokens=special).ids


def test_other_threads_run_while_a_long_text_is_tokenised():
    turns, ended = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not ended.is_set():
            time.sleep(0)
            turns += 1

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        before = turns
        encode(TOKENIZER, "1234567890" * 20_000, special=False)
        assert turns - before > 20  # one that holds the GIL throughout leaves it to others once or twice
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("word", ["1", "the mill ", "日本 ", "x"])
def test_a_text_that_cannot_fit_is_known_from_its_beginning(word: str):
    text = word * 40_000
    tokens = len(encode(TOKENIZER, text, special=False))

    assert hopeless(TOKENIZER, text, tokens) is None
    assert hopeless(TOKENIZER, text, tokens + 1) is None
    least = hopeless(TOKENIZER, text, tokens // 100)
    assert least is not None and tokens // 100 < least <= tokens


def test_only_as_much_of_a_text_is_read_as_it_takes():
    text = "7" * (SLICE_CHARS * 3)
    tokens = len(encode(TOKENIZER, text, special=False))

    least = hopeless(TOKENIZER, text, 100)

    assert least is not None and least <= tokens / 3


def test_what_is_no_text_is_said_by_the_tokenizer():
    with pytest.raises(TypeError):
        encode(TOKENIZER, "\ud800", special=False)
