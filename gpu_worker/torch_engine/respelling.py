"""Text that was shown already, as tokens again: tokens whose bytes are that text, to the byte. Pure.

A tokenizer's own `encode` is made for whole texts, and what it reads need not be what was written: SentencePiece puts a
space before the first word, normalizers join accents to their letters, the name of a special token becomes that token,
which has no text. So what comes back is compared; where it differs, the text is read by a tokenizer that does less to
it, behind something else, and then in halves, down to single characters, which every tokenizer that we take can spell
byte by byte.
"""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]

# A text is read behind each in turn: as a whole text, and inside of one. The second is for a text whose beginning
# would be joined with the first.
ANCHORS = ("", "\n", "x")


def respell(
    text: str, encode: Encode, to_literal: Callable[[], Encode], token_bytes: Sequence[bytes]
) -> list[int] | None:
    """None if the text has a character that cannot be spelled.

    to_literal: that of a `literal` tokenizer, which is slow to make and mostly not needed. token_bytes: of each token
    that may be used.
    """
    tokens = _encode_behind(text, encode, token_bytes)
    return _in_halves(text, to_literal(), token_bytes) if tokens is None else tokens


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads the names of special tokens as text, and all text as it is written where it goes by bytes.

    Else a stretch in which every word holds what is normalized would be spelled letter by letter. SentencePiece needs
    its normalizer, which writes spaces as the vocabulary does.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    cuts = copy.pre_tokenizer.__getstate__().decode() if copy.pre_tokenizer is not None else ""  # its JSON
    if "ByteLevel" in cuts:
        copy.normalizer = None
    return copy


def _in_halves(text: str, encode: Encode, token_bytes: Sequence[bytes]) -> list[int] | None:
    tokens = _encode_behind(text, encode, token_bytes)
    if tokens is not None:
        return tokens
    if len(text) == 1:
        return _spell_bytes(text, token_bytes)
    middle = len(text) // 2
    left, right = _in_halves(text[:middle], encode, token_bytes), _in_halves(text[middle:], encode, token_bytes)
    return None if left is None or right is None else left + right


def _encode_behind(text: str, encode: Encode, token_bytes: Sequence[bytes]) -> list[int] | None:
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
