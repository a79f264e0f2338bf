"""A GGUF file's tokenizer as a `tokenizers` tokenizer: byte-level BPE, exact.

GGUF stores vocabulary, merges and kinds of tokens, and names the splitting rule that goes before them. Those rules are
the published tokenizer.json of each family.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpu_worker.engine import EngineStartError

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types

_LETTERS_DIGITS = (  # %s: how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """metadata: the GGUF fields by name. Raises EngineStartError on a kind that we cannot rebuild exactly."""
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise EngineStartError(
            f"GGUF tokenizer kind {kind!r} cannot be rebuilt exactly; use the model's Hugging Face directory"
        )
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _splitting(rule)
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=kinds[token] == CONTROL, normalized=False)
            for token, piece in enumerate(pieces)
            if kinds[token] in (CONTROL, USER_DEFINED)
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos]} $A", special_tokens=[(pieces[bos], bos)]
        )
    return tokenizer


def _splitting(rule: str) -> pre_tokenizers.PreTokenizer:
    match rule:
        case "smollm":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        case "gpt-2" | "default":
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
