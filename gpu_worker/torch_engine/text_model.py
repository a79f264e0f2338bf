"""The text side of a model directory: tokenizer, template, end tokens and sampling defaults. No torch."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from bus.jobs import Message
from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine import tokenizing
from gpu_worker.torch_engine.chat_template import ChatTemplate, TemplateError
from gpu_worker.torch_engine.detokenizer import byte_fallback_bytes, byte_level_bytes
from gpu_worker.torch_engine.respelling import literal, respell
from gpu_worker.torch_engine.sampling import parse_defaults
from gpu_worker.torch_engine.special_tokens import parse_special_tokens

log = logging.getLogger(__name__)


class TextModel:
    """Raises EngineStartError if the directory lacks something or holds a tokenizer that we do not know."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "config.json")
        generation = read_json(directory / "generation_config.json", optional=True)
        tokenizer_config = read_json(directory / "tokenizer_config.json", optional=True)
        self.tokenizer = _read_tokenizer(directory / "tokenizer.json")
        special = parse_special_tokens(
            tokenizer_config,
            read_json(directory / "special_tokens_map.json", optional=True),
            read_json(directory / "added_tokens.json", optional=True),
        )
        silent = special.add_to(self.tokenizer)
        self.defaults = parse_defaults(generation)
        self.vocabulary = int(config.get("vocab_size", 0))  # rows of the embedding; ids at or above have none
        end = self.tokenizer.token_to_id(special.roles.get("eos_token", ""))
        self.eos = _ends(generation, config, end if end is not None and end < self.vocabulary else None)
        self.template = _template(directory, tokenizer_config, special.roles)
        self.token_bytes = _token_bytes(self.tokenizer, silent | self.eos)
        self._spellable = self.token_bytes[: self.vocabulary]

    def render(self, messages: tuple[Message, ...]) -> str:
        """Raises TemplateError."""
        if self.template is None:
            raise TemplateError("this model has no chat template; send a prompt instead of messages")
        return self.template.render(messages)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """special: add the tokens that the tokenizer's own post-processor puts around a text, such as a leading BOS."""
        return tokenizing.encode(self.tokenizer, text, special=special)

    def digest(self) -> bytes:
        """Equal where texts are cut into the same ids, and ids mean the same text: whatever files say so."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        digest.update(str(sorted(self.eos)).encode())
        for text in self.token_bytes:
            digest.update(len(text).to_bytes(4) + text)
        return digest.digest()

    def respell(self, shown: str) -> list[int] | None:
        """Tokens whose text is exactly this, as it stands behind a prompt; None if this model has none."""
        return respell(shown, _encode_with(self.tokenizer), lambda: _encode_with(self._literal), self._spellable)

    @functools.cached_property
    def _literal(self) -> Tokenizer:
        return literal(self.tokenizer)

    def too_many(self, text: str, tokens_max: int) -> int | None:
        """How many tokens a text has at least that surely does not fit, as far as its beginning shows that."""
        return tokenizing.hopeless(self.tokenizer, text, tokens_max)


def _encode_with(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return functools.partial(tokenizing.encode, tokenizer, special=False)


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


def _ends(generation: Mapping[str, Any], config: Mapping[str, Any], end: int | None) -> frozenset[int]:
    """Tokens that end an answer. end: the tokenizer's own. Where neither config has any, transformers would go on for
    ever behind that one, which nobody wants."""
    for file, fields in (("generation_config.json", generation), ("config.json", config)):
        value = fields.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in ids):
            raise EngineStartError(f"{file}: eos_token_id must be a token id or a list of them, not {value!r}")
        if ids:
            return frozenset(ids)
    log.warning("neither config.json nor generation_config.json names an end token", extra={"taken": end})
    return frozenset() if end is None else frozenset([end])


def _template(directory: Path, tokenizer_config: dict[str, Any], roles: Mapping[str, str]) -> ChatTemplate | None:
    source = _template_source(directory, tokenizer_config)
    if not source:
        return None
    try:
        return ChatTemplate(source, roles)
    except TemplateError as error:
        raise EngineStartError(f"{directory}: {error}") from error


def _template_source(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Of several named ones, the one called default."""
    beside = directory / "chat_template.jinja"
    if beside.exists():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise EngineStartError(f"{beside}: cannot be read: {error}") from error
    source = tokenizer_config.get("chat_template")
    try:
        named = {one["name"]: one["template"] for one in source} if isinstance(source, list) else source
    except (TypeError, KeyError):
        named = 0
    chosen = named.get("default") if isinstance(named, dict) else named
    if named and chosen is None:
        log.warning(
            "none of the model's chat templates is called default", extra={"templates": ", ".join(map(str, named))}
        )
    if chosen is not None and not isinstance(chosen, str):
        raise EngineStartError(
            "tokenizer_config.json: chat_template is neither a template nor several with their names"
        )
    return chosen


def _token_bytes(tokenizer: Tokenizer, silent: frozenset[int] | set[int]) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    hidden = {token for token, described in added.items() if described.special} | silent
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    decoder = tokenizer.decoder.__getstate__().decode() if tokenizer.decoder is not None else ""  # its JSON
    if "ByteLevel" in decoder:
        return byte_level_bytes(vocabulary, added.keys() - hidden, hidden)
    if "ByteFallback" in decoder:
        return byte_fallback_bytes(vocabulary, hidden)
    raise EngineStartError("tokenizer.json: only byte-level and byte-fallback tokenizers are supported")
