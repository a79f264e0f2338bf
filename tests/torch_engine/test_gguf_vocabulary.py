"""What a GGUF file says about its tokens: as llama.cpp reads it, or refused with the name of the field."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_tokenizer import build_tokenizer
from gpu_worker.gguf_vocabulary import check_vocabulary, to_ends
from gpu_worker.torch_engine.detokenizer import byte_level_alphabet

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
LETTERS = list(byte_level_alphabet())


def fields(pieces: list[str], **more: Any) -> dict[str, Any]:
    """Checked metadata of a byte-level vocabulary. more: fields of tokenizer.ggml; None takes one away."""
    own = {"model": "gpt2", "pre": "gpt-2", "tokens": pieces, "merges": [], "token_type": [NORMAL] * len(pieces)}
    named = {f"tokenizer.ggml.{name}": value for name, value in (own | more).items() if value is not None}
    return check_vocabulary(named)


def ends(pieces: list[str], **more: Any) -> list[str]:
    return [pieces[token] for token in to_ends(fields(pieces, **more))]


def byte_level(*more: str, **own: Any) -> Tokenizer:
    """Over all bytes and these pieces."""
    return build_tokenizer(fields([*LETTERS, *more], **own))


@pytest.mark.parametrize(
    "pieces",
    [
        ["<|endoftext|>", "<|im_end|>"],  # Qwen, whose files name the second one only
        ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"],  # Llama 3
        ["</s>"],
        ["<end_of_turn>", "<|end|>", "<EOT>", "<｜end▁of▁sentence｜>"],
        ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"],
    ],
)
@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_an_answer_ends_where_llama_cpp_ends_it(pieces: list[str], kind: int) -> None:
    """By the text of a token, whatever its type and whatever the fields say."""
    assert ends([*pieces, "<s>", "x"], token_type=[kind] * len(pieces) + [CONTROL, NORMAL]) == pieces


def test_an_answer_ends_at_the_tokens_that_the_file_names() -> None:
    named = {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 3, "fim_sep_token_id": 4}

    assert ends(["a", "b", "c", "d", "e", "<|file_sep|>"], **named) == ["b", "c", "d", "e"]


def test_a_part_of_an_answer_is_not_its_end() -> None:
    """Where calls and returns have tokens of their own, <|end|> closes one part of several."""
    assert ends(["<|end|>", "<|return|>", "<|call|>"], eos_token_id=0) == ["<|return|>", "<|call|>"]
    assert ends(["<|end|>", "<|calls|>", "<|flush|>"]) == ["<|calls|>", "<|flush|>"]
    assert ends(["<|end|>", "<|return|>"]) == ["<|end|>", "<|return|>"]
    assert ends(["</s>", "<|tool_response>"]) == ["<|tool_response>"]


def test_what_ends_an_answer_is_one_token_in_a_prompt() -> None:
    """Files exist that say it were normal text; a template that writes it means the token."""
    tokenizer = byte_level("<|im_end|>")

    assert tokenizer.encode("a<|im_end|>").tokens == ["a", "<|im_end|>"]
    assert tokenizer.decode([len(LETTERS)]) == ""


def test_without_types_all_tokens_are_normal() -> None:
    assert fields(["a", "b"], token_type=None)["tokenizer.ggml.token_type"] == [NORMAL, NORMAL]


def test_ids_beyond_the_vocabulary_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """-1, read as unsigned, is how some files say that there is none."""
    found = fields(["a", "b"], bos_token_id=99, padding_token_id=2**32 - 1, eos_token_id=1)

    assert {name for name in found if name.endswith("_id")} == {"tokenizer.ggml.eos_token_id"}
    assert [record.__dict__["field"] for record in caplog.records] == [
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.padding_token_id",
    ]


def test_sentencepiece_has_the_ids_that_everybody_leaves_out() -> None:
    pieces = ["<unk>", "<s>", "</s>", "x"]

    assert to_ends(fields(pieces, model="llama")) == [2]
    assert fields(pieces, model="llama")["tokenizer.ggml.bos_token_id"] == 1
    assert fields(pieces, model="llama", bos_token_id=99)["tokenizer.ggml.bos_token_id"] == 1
    assert fields(pieces, model="llama", bos_token_id=3)["tokenizer.ggml.bos_token_id"] == 3
    assert "tokenizer.ggml.bos_token_id" not in fields(pieces[:1], model="llama")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, "no tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokens": "ab"}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"token_type": [1]}, "2 tokens and 1 of tokenizer.ggml.token_type"),
        ({"token_type": [1.0, 1.0]}, "tokenizer.ggml.token_type is not a list of int"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges has 'ab'"),
        ({"scores": ["1"]}, "tokenizer.ggml.scores is not a list of float"),
        ({"eos_token_id": "b"}, "tokenizer.ggml.eos_token_id is not of type int"),
        ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is not of type int"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is not of type bool"),
        ({"pre": 3}, "tokenizer.ggml.pre is not of type str"),
    ],
)
def test_what_nobody_could_read_is_refused_by_name(more: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineStartError, match=said):
        fields(["a", "b"], **more)


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_file_that_names_no_splitting_rule_is_split_as_llama_cpp_splits_it(
    pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp (build of October 2026) gave the same tokens on 1,500 texts over the default model's vocabulary."""
    splitter = byte_level(pre=pre).pre_tokenizer
    assert splitter is not None

    cut = [word for word, _ in splitter.pre_tokenize_str("I'll pay  $1234567, or (12)?!\n\n  So a+b=c")]

    words = "I|'|ll|Ġpay|ĠĠ|$|123|456|7|,|Ġor|Ġ|(|12|)?!|ĊĊĠ|ĠSo|Ġa|+|b|=|c"
    assert cut == words.split("|")
    assert "names no splitting rule" in caplog.text


def test_unused_tokens_have_no_text_and_no_text_has_them() -> None:
    """They pad the vocabulary to the rows of the embedding."""
    types = [NORMAL] * len(LETTERS) + [UNUSED, CONTROL]

    tokenizer = byte_level("[PAD256]", "<|im_end|>", token_type=types)

    assert tokenizer.decode([len(LETTERS)]) == ""
    assert tokenizer.encode("[PAD256]").tokens == list("[PAD256]")
    assert tokenizer.encode("<|im_end|>").ids == [len(LETTERS) + 1]
