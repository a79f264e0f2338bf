"""The text side of a model directory as it is published: what trainers left switched on, and files that are odd."""

import json
from pathlib import Path
from typing import Any

from gpu_worker.torch_engine.prompt import Answer, prepare
from gpu_worker.torch_engine.text_model import TextModel
from tests.torch_engine.tiny import request, tiny_model, tiny_tokenizer

STORY = "the river and the mill " * 10


def change_tokenizer(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    change_tokenizer(tiny_model(tmp_path, vocab_size=268), added_tokens=[*added, greedy])
    text = TextModel(tmp_path)

    for prompt, tokens in (("<|endoftext|>" * 60, 60), ("<t>" + " " * 3000 + "hi", 3)):
        answer = prepare(request("a", "", messages=(), prompt=prompt), text, context_max=100)

        assert isinstance(answer, Answer)
        assert answer.sequence.prompt_len == tokens
