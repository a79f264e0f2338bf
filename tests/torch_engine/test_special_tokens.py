"""Tokens that are named beside tokenizer.json are those of transformers, in prompts, templates and answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bus.jobs import Message
from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_config import to_tokenizer_config
from gpu_worker.torch_engine.detokenizer import TextStream
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.tiny import tiny_model, tiny_tokenizer

NEXT = tiny_tokenizer().get_vocab_size()
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}]{{ eos_token }}{% endfor %}{{ image_token }}"
)
CONFIG: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
END = {"eos_token": "<|im_end|>"}
TEXT = "hi<|turn|>  the <|turn|><|im_end|> <|endoftext|>"


def described(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": special} | plain | flags


def directory(path: Path, files: dict[str, dict[str, Any]]) -> Path:
    tiny_model(path, vocab_size=NEXT + 2, model_type="llama", num_attention_heads=4)
    for name, fields in ({"tokenizer_config.json": CONFIG | END} | files).items():
        (path / name).write_text(json.dumps(fields))
    return path


MAP = {"bos_token": {"content": "<|endoftext|>", "lstrip": False, "rstrip": True}, "eos_token": "<|im_end|>"}
STATED = {str(token): described(text) for token, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}


def decoder(*more: dict[str, Any]) -> dict[str, Any]:
    return CONFIG | END | {"added_tokens_decoder": STATED | {str(NEXT + n): one for n, one in enumerate(more)}}


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "roles in the config": {"tokenizer_config.json": CONFIG | END | {"bos_token": "<|endoftext|>"}},
    "roles in the map": {"tokenizer_config.json": CONFIG, "special_tokens_map.json": MAP},
    "the map counts more": {
        "tokenizer_config.json": CONFIG | END | {"bos_token": "<|im_start|>"},
        "special_tokens_map.json": MAP,
    },
    "a described config leaves the map out": {
        "tokenizer_config.json": decoder() | {"bos_token": "<|im_start|>"},
        "special_tokens_map.json": MAP,
    },
    "described, special": {"tokenizer_config.json": decoder(described("<|turn|>"))},
    "described, visible": {"tokenizer_config.json": decoder(described("<|turn|>", special=False))},
    "described, it takes spaces": {"tokenizer_config.json": decoder(described("<|turn|>", rstrip=True, lstrip=True))},
    "described otherwise": {
        "tokenizer_config.json": CONFIG
        | END
        | {"added_tokens_decoder": STATED | {"0": described("<|endoftext|>", lstrip=True)}}
    },
    "listed, visible": {"added_tokens.json": {"<|turn|>": NEXT, "<|im_end|>": 2}},
    "listed, special": {
        "tokenizer_config.json": CONFIG | END | {"additional_special_tokens": ["<|turn|>"]},
        "added_tokens.json": {"<|turn|>": NEXT},
    },
    "listed, but described as visible": {
        "tokenizer_config.json": decoder(described("<|turn|>", special=False))
        | {"additional_special_tokens": ["<|turn|>"]}
    },
    "a role of its own": {"tokenizer_config.json": CONFIG | END | {"image_token": "<|turn|>"}},
    "named ones": {"tokenizer_config.json": CONFIG | END | {"extra_special_tokens": {"image_token": "<|turn|>"}}},
    "an ordinary piece": {"tokenizer_config.json": CONFIG | END | {"extra_special_tokens": ["the"]}},
    "more of them in the map": {"special_tokens_map.json": END | {"additional_special_tokens": ["<|turn|>"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_answers_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(directory(tmp_path, CASES[case]))

    ours = TextModel(tmp_path)

    tokens = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, special=False) == tokens
    stream = TextStream(ours.token_bytes, ())
    assert "".join(map(stream.feed, tokens)) == theirs.decode(tokens, skip_special_tokens=True)
    talk = [{"role": "user", "content": "hi"}]
    assert ours.render((Message("user", "hi"),)) == theirs.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"added_tokens.json": {"<|turn|>": NEXT + 1}}, f"added_tokens.json: token '<|turn|>' has id {NEXT + 1}, but"),
        ({"added_tokens.json": {"the": 3}}, "added_tokens.json: token 'the' has id 3, but"),
        ({"added_tokens.json": {"the": None}}, "added_tokens.json: None is no token id"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"1": described("<|im_end|>")}}},
            "added_tokens_decoder: token '<|im_end|>' has id 1, but",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"one": described("a")}}}, "'one' is no token id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": ["<|im_end|>"]}}, "must be an object of objects"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"1": {"text": "a"}}}}, "is no token"),
        ({"tokenizer_config.json": {"bos_token": 5}}, "bos_token: 5 is no token"),
        ({"tokenizer_config.json": {"extra_special_tokens": "<|turn|>"}}, "neither a list nor an object"),
    ],
)
def test_names_that_do_not_fit_the_tokenizer_are_said(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A prompt with the ids of another vocabulary is answered, and answered badly."""
    with pytest.raises(EngineStartError) as refused:
        TextModel(directory(tmp_path, files))

    assert said in str(refused.value)


def test_a_piece_of_text_has_no_role_in_a_gguf_file() -> None:
    """It would be one token without text wherever it is written."""
    metadata = {
        "tokenizer.ggml.tokens": ["!", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1, 3, 3],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }

    assert to_tokenizer_config(metadata) == {"bos_token": "<s>"}


def test_what_begins_and_ends_a_text_has_its_role_also_where_a_gguf_file_calls_it_text() -> None:
    """Files without token types do; a template that writes `bos_token` would write nothing in its place."""
    metadata = {
        "tokenizer.ggml.tokens": ["!", "<|begin|>", "<|turn|>"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }

    assert to_tokenizer_config(metadata) == {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
