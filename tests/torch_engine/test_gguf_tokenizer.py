"""SentencePiece vocabularies in GGUF, held to the sentencepiece library: data/sentencepiece.json is what it said."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bus.settings import Settings
from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_sentencepiece import derive_merges
from gpu_worker.gguf_tokenizer import build_tokenizer
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.detokenizer import TextStream, byte_fallback_bytes
from tests.torch_engine.tiny import request, run, tiny_engine, tiny_model
from tests.torch_engine.tiny_gguf import write_gguf

SAID = json.loads((Path(__file__).parent / "data" / "sentencepiece.json").read_text(encoding="utf-8"))
PIECES: list[str] = [piece for piece, _, _ in SAID["pieces"]]
METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [score for _, score, _ in SAID["pieces"]],
    "tokenizer.ggml.token_type": [kind for _, _, kind in SAID["pieces"]],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
TOKENIZER = build_tokenizer(METADATA)
TABLE = byte_fallback_bytes(TOKENIZER.get_vocab(with_added_tokens=True), hidden=(0, 1, 2))


def test_texts_have_the_tokens_that_sentencepiece_gives_them() -> None:
    """Spaces in a row, a leading one, CJK, joined emoji, bytes, runs of one letter."""
    found = [TOKENIZER.encode(text, add_special_tokens=False).ids for text, _ in SAID["texts"]]

    assert found == [tokens for _, tokens in SAID["texts"]]


def test_a_text_begins_with_bos_where_asked() -> None:
    assert TOKENIZER.encode("a mill").ids[0] == 1
    assert build_tokenizer(METADATA | {"tokenizer.ggml.add_bos_token": False}).encode("a mill").ids[0] != 1
    assert build_tokenizer(METADATA | {"tokenizer.ggml.add_eos_token": True}).encode("a mill").ids[-1] == 2


def test_control_tokens_are_themselves_and_what_follows_begins_anew() -> None:
    """As llama.cpp has it: after a control token a text gets its leading space again."""
    found = TOKENIZER.encode("</s>mill", add_special_tokens=False).ids

    assert found == [2, *TOKENIZER.encode("mill", add_special_tokens=False).ids]


def test_without_the_space_prefix_a_text_begins_as_it_is() -> None:
    plain = build_tokenizer(METADATA | {"tokenizer.ggml.add_space_prefix": False})

    assert plain.encode("mill", add_special_tokens=False).tokens[0][0] == "m"
    assert plain.decode(plain.encode(" mill", add_special_tokens=False).ids) == " mill"


def test_user_defined_pieces_are_never_cut() -> None:
    kinds = [*METADATA["tokenizer.ggml.token_type"], 4]
    more = {"tokenizer.ggml.tokens": [*PIECES, "[INST]"], "tokenizer.ggml.token_type": kinds}
    more["tokenizer.ggml.scores"] = [*METADATA["tokenizer.ggml.scores"], -1000.0]

    found = build_tokenizer(METADATA | more)

    assert len(PIECES) in found.encode("a [INST] b", add_special_tokens=False).ids
    assert "[INST]" in found.decode([len(PIECES)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.scores": None}, "one score"),
        ({"tokenizer.ggml.scores": [0.0] * len(PIECES)}, "equal score"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "normalises"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "normalises"),
        ({"tokenizer.ggml.token_type": [1] * len(PIECES)}, "byte tokens"),
        ({"tokenizer.ggml.token_type": [*METADATA["tokenizer.ggml.token_type"][:-1], 5]}, "unused pieces"),
    ],
)
def test_what_cannot_be_rebuilt_exactly_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineStartError, match=said):
        build_tokenizer(METADATA | change)


def test_every_way_to_cut_a_piece_in_two_is_a_merge() -> None:
    merges = derive_merges({"a": -9.0, "b": -8.0, "ab": -2.0, "ba": -1.0, "aba": -3.0})

    assert merges == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


def test_a_llama_2_file_answers_in_text(tmp_path: Path) -> None:
    """Through conversion, engine and text stream; the answer goes on behind the prompt, with its space."""
    weights = tiny_model(tmp_path / "hf", vocab_size=len(PIECES)) / "model.safetensors"
    source = write_gguf(tmp_path / "llama2.gguf", weights, METADATA)

    engine = tiny_engine(resolve_model(Settings(model_path=str(source), var_dir=str(tmp_path))))

    outcome = run(engine, [request("a", "", messages=(), prompt="the mill")])["a"]
    prompt = engine.text.tokenizer.encode("the mill").ids
    whole = Tokenizer.from_str(engine.text.tokenizer.to_str()).decode(prompt + outcome.tokens)
    assert engine.text.eos == {2}
    assert "�" in whole or "the mill" + outcome.text.decode() == whole


def test_thousands_of_texts_come_back_token_by_token() -> None:
    """The prefix is a space of the first token; `decode` takes it away, a stream behind a prompt must not."""
    chance = random.Random(3)
    alphabet = "aeiou nrst\n\t日本語🙂👩‍👧éä\u0301مرحبا\x00\u200d"
    for text in ["".join(chance.choice(alphabet) for _ in range(chance.randrange(1, 40))) for _ in range(3000)]:
        tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
        stream = TextStream(TABLE, ())

        shown = [stream.feed(token) for token in tokens]

        assert "".join(shown) + stream.finish() == " " + text
        assert TOKENIZER.decode(tokens) == text


def test_any_tokens_read_as_their_bytes_read_at_once() -> None:
    """Bytes that are no UTF-8 included. (`tokenizers` then shows one mark for each byte of the whole run of byte
    tokens, good characters among them too; that cannot be streamed, and loses text.)"""
    chance = random.Random(4)
    for _ in range(3000):
        tokens = [chance.choice((chance.randrange(3, 259), chance.randrange(len(PIECES)))) for _ in range(12)]
        stream = TextStream(TABLE, ())

        found = "".join(stream.feed(token) for token in tokens) + stream.finish()

        whole = b"".join(TABLE[token] for token in tokens).decode(errors="replace")
        assert found == whole
        if "�" not in whole:
            assert found.removeprefix(" ") == TOKENIZER.decode(tokens)
