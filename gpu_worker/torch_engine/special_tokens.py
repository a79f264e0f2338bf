"""Tokens that are named beside tokenizer.json, as transformers 5 reads them. Pure but for `add_to`.

tokenizer_config.json says which tokens begin, end or fill a text, and may describe added tokens with their ids
(`added_tokens_decoder`). Where it does not, older directories say so in special_tokens_map.json and added_tokens.json.
Each of them is one token wherever a text names it, also if tokenizer.json alone would cut it to pieces.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gpu_worker.engine import EngineStartError

Fields = Mapping[str, Any]

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    roles: Mapping[str, str]  # bos_token and the like, and names that are this model's own: what templates know
    special: tuple[AddedToken, ...]  # those, and more without a role
    stated: Mapping[int, AddedToken]  # with the ids that `source` gives them
    source: str
    flags_count: bool  # of stated tokens, more than those in tokenizer.json

    def add_to(self, tokenizer: Tokenizer) -> set[int]:
        """Make each of them one token. Returns the ids of those with a role: they have no text.

        Of all others each token's own flag says so: one that is listed as special may be text in tokenizer.json.

        Raises EngineStartError where the tokenizer has another id than a file states.
        """
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        stated = [self.stated[token_id] for token_id in sorted(self.stated)]
        tokenizer.add_tokens([token for token in stated if self._is_news(token, known.get(token.content))])
        for token_id, token in self.stated.items():
            found = tokenizer.token_to_id(token.content)
            if found != token_id:
                raise EngineStartError(
                    f"{self.source}: token {token.content!r} has id {token_id}, but with tokenizer.json it is {found};"
                    " take both files from one version of the model"
                )
        known |= {token.content: token for token in stated}
        tokenizer.add_special_tokens([token for token in self.special if token.content not in known])
        ids = {tokenizer.token_to_id(text) for text in self.roles.values()}
        return {one for one in ids if one is not None}

    def _is_news(self, token: AddedToken, known: AddedToken | None) -> bool:
        return known is None or (
            self.flags_count and any(getattr(token, name) != getattr(known, name) for name in FLAGS)
        )


def parse_special_tokens(config: Fields, special_map: Fields, added: Fields) -> SpecialTokens:
    """config: tokenizer_config.json. special_map, added: special_tokens_map.json and added_tokens.json, empty if they
    are not there. Raises EngineStartError naming file and field.
    """
    if "added_tokens_decoder" in config:
        source = "tokenizer_config.json: added_tokens_decoder"
        stated = _described(source, config["added_tokens_decoder"])
        return SpecialTokens(*_special("tokenizer_config.json", config), stated, source, flags_count=True)
    roles, special = _special("tokenizer_config.json or special_tokens_map.json", {**config, **special_map})
    names, source = {token.content for token in special}, "added_tokens.json"
    stated = {
        _token_id(source, token_id): AddedToken(text, normalized=text not in names, special=text in names)
        for text, token_id in added.items()
    }
    return SpecialTokens(roles, special, stated, source, flags_count=False)


def _special(source: str, fields: Fields) -> tuple[dict[str, str], tuple[AddedToken, ...]]:
    more = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    named = {name: fields[name] for name in ROLES if fields.get(name)}
    named |= {
        name: value
        for name, value in fields.items()
        if name.endswith("_token") and name not in ROLES and value and isinstance(value, str | dict)
    }
    if isinstance(more, dict):
        named, more = named | more, []
    if not isinstance(more, list):
        raise EngineStartError(f"{source}: extra_special_tokens is neither a list nor an object")
    tokens = {name: _token(f"{source}: {name}", value) for name, value in named.items()}
    extra = [_token(f"{source}: extra_special_tokens", value) for value in more]
    return {name: token.content for name, token in tokens.items()}, (*tokens.values(), *extra)


def _described(source: str, decoder: Any) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict) or not all(isinstance(value, dict) for value in decoder.values()):
        raise EngineStartError(f"{source} must be an object of objects, by token id")
    return {
        _token_id(source, token_id): _token(source, value, special=value.get("special") is True)
        for token_id, value in decoder.items()
    }


def _token(source: str, value: Any, *, special: bool = True) -> AddedToken:
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise EngineStartError(f"{source}: {str(value)[:80]} is no token")
    flags = {name: fields[name] for name in FLAGS if isinstance(fields.get(name), bool)}
    return AddedToken(fields["content"], **(flags | {"special": special}))


def _token_id(source: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise EngineStartError(f"{source}: {value!r} is no token id") from error
