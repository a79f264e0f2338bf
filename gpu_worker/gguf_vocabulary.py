"""What a GGUF file says about its tokens, checked once: whatever is made of it can rely on `check_vocabulary`.

Where a field is missing or out of range, we do what llama.cpp does (ggml-org/llama.cpp, src/llama-vocab.cpp): files are
made to run there. What it cannot load is refused here too, with the name of the field.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from gpu_worker.engine import EngineStartError

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]

PREFIX = "tokenizer.ggml."
IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
SCALARS: Mapping[str, type] = {
    "tokenizer.chat_template": str,
    **{PREFIX + name: str for name in ("model", "pre")},
    **{PREFIX + name: bool for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
    **{f"{PREFIX}{name}_token_id": int for name in IDS},
}
LISTS: Mapping[str, tuple[type, ...]] = {
    "tokens": (str,),
    "merges": (str,),
    "token_type": (int,),
    "scores": (float, int),
}
DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # of SentencePiece; what is said for BPE is Falcon's alone

# llama.cpp ends an answer at these, whatever the fields say and whatever type they are given.
ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<turn|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~["),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
}
# And at these, if no field names the token that they stand for: what separates files where code is filled in.
FILLING_ENDS = {
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}
END_IDS = ("eos", "eot", "eom", *FILLING_ENDS)


def check_vocabulary(metadata: Fields) -> dict[str, Any]:
    """The metadata with one type for each token, and ids that are tokens. Raises EngineStartError naming the field."""
    for name, kind in SCALARS.items():
        if name in metadata and type(metadata[name]) is not kind:
            raise EngineStartError(f"the GGUF file's {name} is not of type {kind.__name__}; convert the model again")
    for name, kinds in LISTS.items():
        values = metadata.get(PREFIX + name, [])
        if not isinstance(values, list) or (values and not isinstance(values[0], kinds)):  # an array has one type
            raise EngineStartError(f"the GGUF file's {PREFIX}{name} is not a list of {kinds[0].__name__}")
    pieces = _check_pieces(metadata)
    ids = {f"{PREFIX}{name}_token_id": _check_id(metadata, name, len(pieces)) for name in IDS}
    known = {name: value for name, value in metadata.items() if name not in ids}
    checked = known | {name: token for name, token in ids.items() if token is not None} | {PREFIX + "tokens": pieces}
    return checked | {PREFIX + "token_type": _check_types(checked)}


def to_ends(metadata: Fields) -> list[int]:
    """Tokens that end an answer. metadata: checked."""
    pieces, texts = metadata[PREFIX + "tokens"], _end_texts(metadata)
    named = {metadata.get(f"{PREFIX}{name}_token_id") for name in END_IDS}
    exempt = _exempt(texts)
    return [token for token, piece in enumerate(pieces) if (piece in texts or token in named) and piece not in exempt]


def _end_texts(metadata: Fields) -> set[str]:
    unnamed = (texts for name, texts in FILLING_ENDS.items() if f"{PREFIX}{name}_token_id" not in metadata)
    return ENDS.union(*unnamed).intersection(metadata[PREFIX + "tokens"])


def _exempt(texts: set[str]) -> set[str]:
    """What is no end beside others: a part of an answer ends so in one vocabulary, and nothing in another."""
    parts = texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}
    return ({"<|end|>"} if parts else set()) | ({"</s>"} if "<|tool_response>" in texts else set())


def _check_pieces(metadata: Fields) -> list[str]:
    pieces = metadata.get(PREFIX + "tokens")
    if not pieces:
        raise EngineStartError(f"the GGUF file has no {PREFIX}tokens; use one that brings its tokenizer")
    if metadata.get(PREFIX + "model") == "gpt2" and PREFIX + "merges" not in metadata:
        raise EngineStartError(f"the GGUF file has no {PREFIX}merges; convert the model again")
    odd = next((merge for merge in metadata.get(PREFIX + "merges", ()) if " " not in merge[1:]), None)
    if odd is not None:
        raise EngineStartError(
            f"the GGUF file's {PREFIX}merges has {odd!r}, which is not a pair; convert the model again"
        )
    named = [piece or f"[EMPTY_{token}]" for token, piece in enumerate(pieces)]
    if len(set(named)) < len(named):
        twice = next(piece for piece, times in Counter(named).items() if times > 1)
        raise EngineStartError(f"the GGUF file's {PREFIX}tokens has {twice!r} twice; convert the model again")
    return named


def _check_id(metadata: Fields, name: str, count: int) -> int | None:
    default = DEFAULT_IDS.get(name, count) if metadata.get(PREFIX + "model") == "llama" else count
    token = metadata.get(f"{PREFIX}{name}_token_id", default)
    if 0 <= token < count:
        return int(token)
    if f"{PREFIX}{name}_token_id" in metadata:
        extra = {"field": f"{PREFIX}{name}_token_id", "value": token, "tokens": count}
        log.warning("the GGUF file names a token that it does not have, which is ignored", extra=extra)
    return default if default < count else None


def _check_types(metadata: Fields) -> list[int]:
    """Normal ones if the file does not say; what ends an answer is no text of it, so it has to be a control token."""
    pieces, ends = metadata[PREFIX + "tokens"], _end_texts(metadata)
    types = metadata.get(PREFIX + "token_type", [TokenType.NORMAL] * len(pieces))
    if len(types) < len(pieces):
        raise EngineStartError(f"the GGUF file has {len(pieces)} tokens and {len(types)} of {PREFIX}token_type")
    ends -= _exempt(ends)
    return [int(TokenType.CONTROL) if piece in ends else int(kind) for piece, kind in zip(pieces, types, strict=False)]
