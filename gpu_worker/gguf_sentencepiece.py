"""A GGUF file's SentencePiece vocabulary (Llama 2, Mistral) as a `tokenizers` BPE.

SentencePiece joins neighbours while the joined text is a piece, the best score first. GGUF stores pieces and scores but
no merges, so every way to cut a piece into two pieces becomes one, in the order of the scores, as transformers'
converters have it. Held to the sentencepiece library by test_gguf_tokenizer.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

from gpu_worker.engine import EngineStartError

SPACE = "▁"


def build_sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """Without its added tokens and BOS. Raises EngineStartError on what cannot be rebuilt exactly."""
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or not len(pieces) == len(scores) == len(kinds):
        raise EngineStartError("the GGUF file's tokenizer does not have one score and one type for each token")
    if metadata.get("tokenizer.ggml.precompiled_charsmap") or metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise EngineStartError("a GGUF tokenizer that normalises its text is not supported")
    if sum(kind == TokenType.BYTE for kind in kinds) != 256:
        raise EngineStartError("the GGUF file's tokenizer lacks byte tokens")
    unused = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == TokenType.UNUSED]
    odd = [piece for piece in unused if not piece.startswith("[PAD")]
    if odd:
        raise EngineStartError(f"a GGUF tokenizer with unused pieces, such as {odd[0]!r}, cannot be rebuilt exactly")
    mergeable = {piece: scores[token] for token, piece in enumerate(pieces) if kinds[token] == TokenType.NORMAL}
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces) if kinds[token] != TokenType.UNUSED},
            merges=derive_merges(mergeable),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix: Sequence[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def derive_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Best first. scores: of each piece that joining may make; equal ones would leave the order open: refused."""
    cuts = [
        (score, at, piece)
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    made = {piece: score for score, _, piece in cuts}
    if len(set(made.values())) < len(made):
        raise EngineStartError("a GGUF tokenizer with pieces of equal score cannot be rebuilt exactly")
    return [(piece[:at], piece[at:]) for _, at, piece in sorted(cuts, reverse=True)]
