"""A GGUF file's tokenizer as a `tokenizers` tokenizer: byte-level BPE and SentencePiece, exact, or refused.

For byte-level BPE GGUF stores vocabulary, merges and kinds of tokens, and names the splitting rule that goes before
them. Those rules are the published tokenizer.json of each family. A file that names none, or `default`, is split as
llama.cpp splits it, which is no family's way. SentencePiece: gguf_sentencepiece.py.

Unused tokens (padding of the vocabulary) are left out: they have no text, and no text has them.
"""

import logging
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_sentencepiece import build_sentencepiece

log = logging.getLogger(__name__)

_LETTERS_DIGITS = (  # %s: how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT_CUTS = (  # one after the other, each within what the last one left whole (llama.cpp, src/llama-vocab.cpp)
    r"[\p{P}$+<=>^~|]+",
    r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9]{3}",
)
_SAME_RULE = {"": "default", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """metadata: the GGUF fields by name, checked. Raises EngineStartError on a kind that we cannot rebuild exactly."""
    kind = metadata.get("tokenizer.ggml.model")
    named = metadata.get("tokenizer.ggml.pre", "")
    rule = _SAME_RULE.get(named, named)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, rule)
    elif kind == "llama":
        tokenizer = build_sentencepiece(metadata)
    else:
        raise EngineStartError(
            f"GGUF tokenizer kind {kind!r} cannot be rebuilt exactly; use the model's Hugging Face directory"
        )
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=kinds[token] in special, normalized=False)
            for token, piece in enumerate(pieces)
            if kinds[token] in (*special, TokenType.USER_DEFINED)
        ]
    )
    _surround(tokenizer, metadata, bos=kind == "llama" or rule == "llama-bpe")
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], rule: str) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {piece: token for token, piece in enumerate(pieces) if kinds[token] != TokenType.UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _splitting(rule)
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _surround(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, bos: bool) -> None:
    """The tokens around a whole text. bos: what llama.cpp does for this kind of tokenizer if the file does not say."""
    pieces = metadata["tokenizer.ggml.tokens"]
    begin = metadata.get("tokenizer.ggml.bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", bos) else None
    end = metadata.get("tokenizer.ggml.eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token") else None
    around = [token for token in (begin, end) if token is not None]
    if around:
        parts = [pieces[begin] if begin is not None else None, "$A", pieces[end] if end is not None else None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part], special_tokens=[(pieces[token], token) for token in around]
        )


def _splitting(rule: str) -> pre_tokenizers.PreTokenizer:
    match rule:
        case "smollm":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        case "default":
            log.warning(
                "the GGUF file names no splitting rule: texts may be cut unlike those that the model learnt from"
            )
            cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _DEFAULT_CUTS]
            return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        case "gpt-2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        case "llama-bpe" | "qwen2":
            pattern = _LETTERS_DIGITS % ("1,3" if rule == "llama-bpe" else "1")
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
    raise EngineStartError(f"GGUF splitting rule {rule!r} is not known; use the model's Hugging Face directory")
