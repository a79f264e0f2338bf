"""The text side of a model directory: tokenizer, template, end tokens and sampling defaults. No torch."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from bus.jobs import Message
from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine import tokenizing
from gpu_worker.torch_engine.chat_template import ChatTemplate, TemplateError
from gpu_worker.torch_engine.detokenizer import byte_fallback_bytes, byte_level_bytes
from gpu_worker.torch_engine.respelling import respell
from gpu_worker.torch_engine.sampling import parse_defaults

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TextModel:
    """Raises EngineStartError if the directory lacks something or holds a tokenizer that we do not know."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "config.json")
        generation = read_json(directory / "generation_config.json", optional=True)
        tokenizer_config = read_json(directory / "tokenizer_config.json", optional=True)
        self.tokenizer = _read_tokenizer(directory / "tokenizer.json")
        self.eos = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")))
        self.defaults = parse_defaults(generation)
        self.vocabulary = int(config.get("vocab_size", 0))  # rows of the embedding; ids at or above have none
        self.template = _template(directory, tokenizer_config)
        self.token_bytes = _token_bytes(self.tokenizer, self.eos)
        self._spellable = self.token_bytes[: self.vocabulary]

    def render(self, messages: tuple[Message, ...]) -> str:
        """Raises TemplateError."""
        if self.template is None:
            raise TemplateError("this model has no chat template; send a prompt instead of messages")
        return self.template.render(messages)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """special: add the tokens that the tokenizer's own post-processor puts around a text, such as a leading BOS."""
        return tokenizing.encode(self.tokenizer, text, special=special)

    def respell(self, shown: str) -> list[int] | None:
        """Tokens whose text is exactly this, as it stands behind a prompt; None if this model has none."""
        return respell(shown, lambda text: self.encode(text, special=False), self._spellable)

    def too_many(self, text: str, tokens_max: int) -> int | None:
        """How many tokens a text has at least that surely does not fit, as far as its beginning shows that."""
        return tokenizing.hopeless(self.tokenizer, text, tokens_max)


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Raises EngineStartError naming the file."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineStartError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise EngineStartError(f"{path}: expected an object")
    return content


def _read_tokenizer(path: Path) -> Tokenizer:
    """With what its trainer left switched on off: no prompt is cut or filled, and each splits the same way always."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise EngineStartError(f"{path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([value])


def _template(directory: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    beside = directory / "chat_template.jinja"
    source: Any = beside.read_text(encoding="utf-8") if beside.exists() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several named templates: the one called default
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if not source:
        return None
    named = {name: _special_text(tokenizer_config.get(name)) for name in SPECIAL_NAMES}
    special = {name: text for name, text in named.items() if text}  # templates ask whether one `is defined`
    try:
        return ChatTemplate(source, special)
    except TemplateError as error:
        raise EngineStartError(f"{directory}: {error}") from error


def _special_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, dict) else value or ""


def _token_bytes(tokenizer: Tokenizer, eos: frozenset[int]) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    hidden = {token for token, described in added.items() if described.special} | eos
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    decoder = tokenizer.decoder.__getstate__().decode() if tokenizer.decoder is not None else ""  # its JSON
    if "ByteLevel" in decoder:
        return byte_level_bytes(vocabulary, added.keys() - hidden, hidden)
    if "ByteFallback" in decoder:
        return byte_fallback_bytes(vocabulary, hidden)
    raise EngineStartError("tokenizer.json: only byte-level and byte-fallback tokenizers are supported")
