"""An answer that goes on from its text alone has tokens that spell it, where it can the ones its model would draw."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpu_worker.torch_engine.detokenizer import byte_fallback_bytes, byte_level_bytes
from gpu_worker.torch_engine.respelling import literal, respell
from tests.torch_engine.test_gguf_tokenizer import TOKENIZER
from tests.torch_engine.tiny import SPECIAL, tiny_tokenizer


def with_metaspace(prepend_scheme: str, *, split: bool = False) -> Tokenizer:
    """The same vocabulary as newer Hugging Face conversions of Llama 2 and Mistral have it."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=split)
    return tokenizer


def with_nfc() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def with_prefix_space() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


SENTENCEPIECE = {
    "prepend": TOKENIZER,
    "metaspace first": with_metaspace("first"),
    "metaspace always": with_metaspace("always", split=True),
    "metaspace never": with_metaspace("never"),
}
BYTE_LEVEL = {"plain": tiny_tokenizer(), "nfc": with_nfc(), "prefix space": with_prefix_space()}


TOKENIZERS = SENTENCEPIECE | BYTE_LEVEL


def table(tokenizer: Tokenizer) -> list[bytes]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        return byte_level_bytes(vocabulary, (), range(len(SPECIAL)))
    return byte_fallback_bytes(vocabulary, (0, 1, 2))


TABLES = {kind: table(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


def encode_with(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def spelled(text: str, tokenizer: Tokenizer, known: list[bytes]) -> list[int] | None:
    return respell(text, encode_with(tokenizer), lambda: encode_with(literal(tokenizer)), known)


def respelled(kind: str, text: str) -> list[str]:
    tokenizer = TOKENIZERS[kind]
    found = spelled(text, tokenizer, TABLES[kind])
    assert found is not None
    assert b"".join(TABLES[kind][token] for token in found) == text.encode()
    return [str(tokenizer.id_to_token(token)) for token in found]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_the_space_before_the_first_word_is_there_as_often_as_it_was_shown(kind: str) -> None:
    """`encode` is for the beginning of a text, where it puts a space that nobody wrote."""
    assert respelled(kind, " the mill") == ["▁the", "▁m", "ill"]
    assert respelled(kind, "mill") == ["m", "ill"]
    assert respelled(kind, "\n the mill")[0] == "<0x0A>"
    assert respelled(kind, " ") == ["▁"]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokens_are_those_of_the_text(kind: str) -> None:
    assert respelled(kind, "the and") == ["the", "Ġand"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_was_shown_is_spelled_to_the_byte(kind: str) -> None:
    """Names of special tokens that were written out, accents on their own, spaces at both ends."""
    chance = random.Random(5)
    parts = ("the mill", " ", "\n", "e\u0301", "日本", "🙂", "<|im_end|>", "</s>", "▁", "x", "\ufffd", "1 ", "\u1161")
    for _ in range(100):
        respelled(kind, "".join(chance.choices(parts, k=chance.randrange(1, 9))))


@pytest.mark.parametrize("odd", ["e\u0301", "<|im_end|>"])
def test_what_a_tokenizer_reads_otherwise_costs_its_neighbours_nothing(odd: str) -> None:
    """Where it comes with every word, as accents of Vietnamese do, text in halves would end at letters."""
    words = respelled("nfc", f"the{odd} and" * 50)

    assert words.count("the") == words.count("Ġand") == 50


def test_a_text_that_is_read_as_it_was_written_needs_no_second_tokenizer() -> None:
    """It is a copy, which takes tenths of a second in which nothing else runs."""

    def too_early() -> Callable[[str], list[int]]:
        raise AssertionError

    assert respell("the and", encode_with(TOKENIZERS["nfc"]), too_early, TABLES["nfc"]) is not None


def test_a_token_without_an_embedding_spells_nothing() -> None:
    tokenizer = tiny_tokenizer()
    known = table(tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])

    found = spelled("a<tool>", tokenizer, known)

    assert found is not None and max(found) < len(known)


def test_what_a_model_cannot_spell_is_said() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))

    assert spelled("ab", tokenizer, [b"a"]) is None
