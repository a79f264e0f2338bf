"""Tokens to text, token by token. Pure.

Each token stands for some bytes; text is their UTF-8 decoding, bad bytes as U+FFFD. Only whole characters leave, so
the pieces, put together, are the decoding of the whole (held to `tokenizers` by test_detokenizer.py).
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

from gpu_worker.torch_engine.stopping import StopScanner

BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, `bytes_to_unicode`): character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level_bytes(vocabulary: Mapping[str, int], plain: Iterable[int], hidden: Iterable[int]) -> list[bytes]:
    """Bytes of each token id of a byte-level BPE. `plain` tokens stand as written, `hidden` ones have no text."""
    alphabet, literal, silent = byte_level_alphabet(), set(plain), set(hidden)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        if token in silent:
            continue
        as_is = token in literal or any(char not in alphabet for char in piece)
        table[token] = piece.encode() if as_is else bytes(alphabet[char] for char in piece)
    return table


def byte_fallback_bytes(vocabulary: Mapping[str, int], hidden: Iterable[int]) -> list[bytes]:
    """Bytes of each token id of a SentencePiece-like BPE: `▁` is a space, `<0x0A>` a byte."""
    silent = set(hidden)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        if token in silent:
            continue
        is_byte = BYTE_PIECE.fullmatch(piece)
        table[token] = bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()
    return table


class TextStream:
    """The text of one answer, as it may be shown: whole characters, stop strings held back.

    shown: what stands before the tokens that will be fed, for stop strings that begin in it.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str], shown: str = "") -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._scanner = StopScanner(stops, shown)

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    def held_before(self, token: int) -> int:
        """UTF-8 bytes that lie between the text let out so far and this token, which is about to be fed."""
        begun = self._decoder.getstate()[0]
        try:
            codecs.utf_8_decode(begun + self._bytes_of(token)[:1], "strict", False)
        except UnicodeDecodeError:  # the token does not go on with the character that was begun: that becomes U+FFFD
            return len(self._scanner.held.encode()) + (3 if begun else 0)
        return len(self._scanner.held.encode()) + len(begun)

    def feed(self, token: int) -> str:
        """Text that this token lets out. An id beyond the vocabulary (padding rows of the head) has no text."""
        return self._scanner.feed(self._decoder.decode(self._bytes_of(token)))

    def finish(self) -> str:
        """The answer is over: what was held back, incomplete characters as U+FFFD. May still find a stop string."""
        last = self._scanner.feed(self._decoder.decode(b"", final=True))
        return last if self.stopped else last + self._scanner.finish()

    def _bytes_of(self, token: int) -> bytes:
        return self._token_bytes[token] if token < len(self._token_bytes) else b""
