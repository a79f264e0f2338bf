"""Text that was shown already, as tokens again: tokens whose bytes are that text, to the byte. Pure.

A tokenizer's own `encode` is made for whole texts, and what it reads need not be what was written: SentencePiece puts a
space before the first word, normalizers join accents to their letters, the name of a special token becomes that token,
which has no text. So what comes back is compared; where it differs, the text is encoded behind something else, and then
in halves, down to single characters, which every tokenizer that we take can spell byte by byte.
"""

from collections.abc import Callable, Sequence

# A text is read behind each in turn: as a whole text, and inside of one. The second is for a text whose beginning
# would be joined with the first.
ANCHORS = ("", "\n", "x")


def respell(text: str, encode: Callable[[str], list[int]], token_bytes: Sequence[bytes]) -> list[int] | None:
    """token_bytes: of each token that may be used. None if the text has a character that they cannot spell."""
    tokens = _encode_behind(text, encode, token_bytes)
    if tokens is not None:
        return tokens
    if len(text) == 1:
        return _spell_bytes(text, token_bytes)
    middle = len(text) // 2
    left, right = respell(text[:middle], encode, token_bytes), respell(text[middle:], encode, token_bytes)
    return None if left is None or right is None else left + right


def _encode_behind(text: str, encode: Callable[[str], list[int]], token_bytes: Sequence[bytes]) -> list[int] | None:
    for anchor in ANCHORS:
        before, whole = encode(anchor), encode(anchor + text)
        tokens = whole[len(before) :]
        usable = whole[: len(before)] == before and max(tokens, default=0) < len(token_bytes)
        if usable and b"".join(token_bytes[token] for token in tokens) == text.encode():
            return tokens
    return None


def _spell_bytes(character: str, token_bytes: Sequence[bytes]) -> list[int] | None:
    try:
        return [token_bytes.index(bytes([byte])) for byte in character.encode()]
    except ValueError:
        return None
