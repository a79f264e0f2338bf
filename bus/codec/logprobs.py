"""Log probabilities of an answer's tokens as bytes: one record a token, one after the other, beside the text.

    record     size u16, of all of it | at u32 | count u8 | candidates
    candidate  log probability f32 | length u16, 0x8000 set: a special token, the bytes are its name and no text | bytes

Numbers are little endian. The first candidate is the token itself, the others are the likeliest ones, in falling order.
`at`: bytes of the answer's text before the token. Tokens may be stored before their text is shown, and the text of a
stop string never is, so a reader takes a token's record when it takes the byte at `at`.

A record without candidates says that another engine went on with the text from `at` on: records before it that begin
there or behind have no text.
"""

import struct
from collections.abc import Iterator, Sequence

import msgspec

from bus.jobs import LOGPROBS_MAX

ANSWER_BYTES_MAX = 16 * 1024 * 1024  # of one answer: some 48,000 tokens with 20 likeliest ones each
PART_BYTES = 64 * 1024  # are checked in one go: a few milliseconds, whatever the records are like
TOKEN_BYTES_MAX = 1024  # of one candidate; longer ones are cut, and no vocabulary has any
LEAST_LOGPROB = -9999.0  # OpenAI's word for "very unlikely"; also stands for minus infinity
SPECIAL = 0x8000

_HEAD = struct.Struct("<HIB")
_CANDIDATE = struct.Struct("<fH")


class Candidate(msgspec.Struct, frozen=True):
    token: bytes  # its bytes; perhaps not a whole character
    logprob: float
    special: bool = False  # `token` is a name and stands for no text


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token of the answer. `top` may hold it once more, if it is among the likeliest."""

    at: int
    chosen: Candidate
    top: tuple[Candidate, ...] = ()


def encode_record(record: TokenLogprobs) -> bytes:
    candidates = (record.chosen, *record.top[:LOGPROBS_MAX])
    body = b"".join(map(_encode_candidate, candidates))
    return _HEAD.pack(_HEAD.size + len(body), record.at, len(candidates)) + body


def encode_restart(at: int) -> bytes:
    """Another engine goes on from this byte of the text."""
    return _HEAD.pack(_HEAD.size, at, 0)


def _encode_candidate(one: Candidate) -> bytes:
    token = one.token[:TOKEN_BYTES_MAX]
    logprob = max(min(one.logprob, 0.0), LEAST_LOGPROB)
    return _CANDIDATE.pack(logprob, len(token) | (SPECIAL if one.special else 0)) + token


def decode_record(raw: bytes | bytearray | memoryview, start: int = 0) -> TokenLogprobs | None:
    """The record at `start` of bytes that `RecordIndex` took in; None for one without candidates."""
    _, at, count = _HEAD.unpack_from(raw, start)
    found, begin = [], start + _HEAD.size
    for _ in range(count):
        logprob, size = _CANDIDATE.unpack_from(raw, begin)
        begin += _CANDIDATE.size
        end = begin + (size & ~SPECIAL)
        found.append(Candidate(bytes(raw[begin:end]), logprob, size >= SPECIAL))
        begin = end
    return TokenLogprobs(at, found[0], tuple(found[1:])) if found else None


def record_places(raw: bytes | bytearray, start: int = 0) -> list[tuple[int, int]]:
    """(at, end) of each record from byte `start` on. Raises ValueError for bytes that are not whole, valid records.

    Makes no objects of them: an answer may have a million candidates, and whoever waits for it has other work."""
    places = []
    unpack_candidate, candidate_size, size_bits = _CANDIDATE.unpack_from, _CANDIDATE.size, SPECIAL - 1
    while start < len(raw):
        try:
            size, at, count = _HEAD.unpack_from(raw, start)
            end = start + _HEAD.size
            for _ in range(count):
                logprob, length = unpack_candidate(raw, end)
                length &= size_bits
                if not LEAST_LOGPROB <= logprob <= 0.0 or length > TOKEN_BYTES_MAX:  # also refuses what is no number
                    raise ValueError("a candidate's figures are out of range")
                end += candidate_size + length
        except struct.error as error:
            raise ValueError("a record is cut off") from error
        if count > 1 + LOGPROBS_MAX:
            raise ValueError("a record has too many candidates")
        if end != start + size:
            raise ValueError("a record's size is not that of its candidates")
        if end > len(raw):
            raise ValueError("a candidate is cut off")
        places.append((at, end))
        start = end
    return places


def record_parts(raw: bytes, most: int = PART_BYTES) -> Iterator[bytes]:
    """All of it in parts of whole records, of at most `most` bytes unless one record has more. From where the bytes are
    no records on, the rest is one part: `record_places` refuses it where it begins to be wrong."""
    begin = end = 0
    while end + _HEAD.size <= len(raw):
        size: int = _HEAD.unpack_from(raw, end)[0]
        if size < _HEAD.size or end + size > len(raw):
            break
        if begin < end and end + size - begin > most:
            yield raw[begin:end]
            begin = end
        end += size
    if begin < len(raw):
        yield raw[begin:]


def record_heads(raw: bytes | bytearray) -> list[tuple[int, int]]:
    """(at, end) of each record that `encode_record` and `encode_restart` wrote, or `record_places` took. The last end
    is beyond `raw` if that one is cut off, or misses its end if its head is."""
    places, start = [], 0
    while start + _HEAD.size <= len(raw):
        size, at, _ = _HEAD.unpack_from(raw, start)
        start += size
        places.append((at, start))
    return places


def shown_records(raw: bytes | bytearray, text_len: int) -> list[TokenLogprobs]:
    """The records of a text of `text_len` bytes, in order: without those that another engine's have taken the place of,
    and those of which nothing is shown. Raises ValueError."""
    starts = [0, *(end for _, end in record_places(raw))]
    return collect([decode_record(raw, start) or at_of(raw, start) for start in starts[:-1]], 0, text_len)


def is_restart(raw: bytes | bytearray, start: int) -> bool:
    """Whether the record at `start` has no candidates."""
    return not raw[start + _HEAD.size - 1]


def at_of(raw: bytes | bytearray, start: int) -> int:
    at: int = _HEAD.unpack_from(raw, start)[1]
    return at


def collect(records: Sequence[TokenLogprobs | int], start: int, end: int) -> list[TokenLogprobs]:
    """Those that begin in bytes start..end of the text. A number stands for a record without candidates."""
    found: list[TokenLogprobs] = []
    for record in records:
        if isinstance(record, int):
            while found and found[-1].at >= record:
                found.pop()
        else:
            found.append(record)
    return [record for record in found if start <= record.at < end]
