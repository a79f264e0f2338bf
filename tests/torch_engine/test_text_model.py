"""The text side of a model directory as it is published: what trainers left switched on, and files that are odd."""

import json
from pathlib import Path
from typing import Any

import pytest

from bus.jobs import Message
from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.detokenizer import byte_fallback_bytes
from gpu_worker.torch_engine.prompt import Answer, prepare
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.tiny import request, tiny_model, tiny_tokenizer

STORY = "the river and the mill " * 10


def change(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def test_what_a_trainer_left_switched_on_changes_no_prompt(tmp_path: Path) -> None:
    """Cut prompts lose their question, and padding would be read as text. transformers sets both anew in each call."""
    tokenizer = tiny_tokenizer()
    expected = tokenizer.encode(STORY).ids
    tokenizer.enable_truncation(max_length=16)
    tokenizer.enable_padding(length=200, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.model.dropout = 0.9
    tokenizer.save(str(tiny_model(tmp_path) / "tokenizer.json"))

    text = TextModel(tmp_path)

    assert text.encode(STORY, special=False) == text.encode(STORY, special=True) == expected


def test_a_prompt_of_few_long_tokens_is_no_long_prompt(tmp_path: Path) -> None:
    """Special tokens, and spaces that one takes in, are many bytes of few tokens."""
    added = json.loads(tiny_tokenizer().to_str())["added_tokens"]
    greedy = added[0] | {"id": 267, "content": "<t>", "rstrip": True}
    change(tiny_model(tmp_path, vocab_size=268) / "tokenizer.json", added_tokens=[*added, greedy])
    text = TextModel(tmp_path)

    for prompt, tokens in (("<|endoftext|>" * 60, 60), ("<t>" + " " * 3000 + "hi", 3)):
        answer = prepare(request("a", "", messages=(), prompt=prompt), text, context_max=100)

        assert isinstance(answer, Answer)
        assert answer.sequence.prompt_len == tokens


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages|length }}",
        {"default": "{{ messages|length }}"},
        [{"name": "default", "template": "{{ messages|length }}"}],
    ],
)
def test_of_several_chat_templates_the_default_is_taken(template: Any, tmp_path: Path) -> None:
    change(tiny_model(tmp_path) / "tokenizer_config.json", chat_template=template)

    assert TextModel(tmp_path).render((Message("user", "hi"),)) == "1"


def test_chat_templates_none_of_which_is_the_default_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(tiny_model(tmp_path) / "tokenizer_config.json", chat_template={"rag": "x", "tool_use": "y"})

    assert TextModel(tmp_path).template is None
    assert [record.__dict__["templates"] for record in caplog.records] == ["rag, tool_use"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: cannot be read"),
        ("chat_template.jinja", b"{% for %}", "does not parse"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", b'{"chat_template": {"default": []}}', "tokenizer_config.json: chat_template"),
        ("special_tokens_map.json", b"{", "special_tokens_map.json: cannot be read"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "generation_config.json: eos_token_id must be a token id"),
        ("generation_config.json", b'{"eos_token_id": [[2]]}', "generation_config.json: eos_token_id must be"),
        ("generation_config.json", b'{"eos_token_id": {}}', "generation_config.json: eos_token_id must be"),
    ],
)
def test_an_odd_file_is_named(file: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tiny_model(tmp_path) / file).write_bytes(content)

    with pytest.raises(EngineStartError) as refused:
        TextModel(tmp_path)

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("generation", "config", "named", "ends"),
    [
        ([0, 2], 1, "<|im_end|>", {0, 2}),
        (None, 1, "<|im_end|>", {1}),
        (None, None, "<|im_end|>", {2}),
        (None, None, "<|unheard of|>", set()),
        (None, None, None, set()),
    ],
)
def test_an_answer_ends_where_the_first_file_that_says_so_ends_it(
    generation: Any, config: Any, named: str | None, ends: set[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only the tokenizer knows its end, transformers would write on behind it up to the length."""
    directory = tiny_model(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    change(directory / "config.json", eos_token_id=config)
    change(directory / "tokenizer_config.json", eos_token=named)

    assert TextModel(directory).eos == ends
    assert ("names an end token" in caplog.text) == (generation is config is None)


def test_what_only_looks_like_a_byte_is_text() -> None:
    pieces = ["<0x41>", "<0xe9>", "<0xZZ>", "<0x+1>", "<0x 1>"]

    table = byte_fallback_bytes({piece: token for token, piece in enumerate(pieces)}, hidden=())

    assert table == [b"A", b"\xe9", b"<0xZZ>", b"<0x+1>", b"<0x 1>"]
