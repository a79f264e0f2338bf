"""Log probabilities as an HTTP node tells them, in either of OpenAI's shapes, to records of ours. Pure.

Every number and text is the node's word: what is no log probability is refused, and never becomes a record. The job
then ends as one that no node like this can do: another attempt would get the same.
"""

import math
import re
from collections.abc import Sequence

from bus.codec.logprobs import (
    LEAST_LOGPROB,
    TOKEN_BYTES_MAX,
    Candidate,
    TokenLogprobs,
    encode_record,
    encode_restart,
)
from bus.jobs import LOGPROBS_MAX
from gpu_worker.relay_engine.faults import NoLogprobs

Scored = tuple[Candidate, ...]  # a token, then the likeliest ones
_looks_special = re.compile(r"<[^<>\s]{1,64}>").fullmatch  # <|im_end|>, </s>


def read_scores(found: object) -> tuple[Scored, ...] | None:
    """The `logprobs` of a choice; None if there are none. Raises NoLogprobs."""
    if not isinstance(found, dict):
        return None
    if isinstance(content := found.get("content"), list):
        return tuple(_entry(one) for one in content)
    if isinstance(tokens := found.get("tokens"), list):
        return _four_lists(tokens, found)
    return None


def _entry(one: object) -> Scored:
    if not isinstance(one, dict):
        raise NoLogprobs
    top = one.get("top_logprobs") or []
    if not isinstance(top, list):
        raise NoLogprobs
    return (_candidate(one), *(_candidate(other) for other in top[:LOGPROBS_MAX]))


def _candidate(one: object) -> Candidate:
    if not isinstance(one, dict) or not isinstance(text := one.get("token"), str) or "logprob" not in one:
        raise NoLogprobs
    raw = one.get("bytes")
    if raw is None:  # of a special token, or of every token of a server that fills in none
        return _of_text(text, one.get("logprob"), special=_looks_special(text) is not None)
    if not isinstance(raw, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in raw):
        raise NoLogprobs
    return Candidate(_bounded(bytes(raw)), _number(one.get("logprob")))


def _four_lists(tokens: Sequence[object], found: dict[str, object]) -> tuple[Scored, ...]:
    """The older shape names no bytes: a part of a character is told apart by nobody there."""
    values, tops = found.get("token_logprobs"), found.get("top_logprobs")
    if not isinstance(values, list) or len(values) != len(tokens):
        raise NoLogprobs
    likeliest = tops if isinstance(tops, list) and len(tops) == len(tokens) else [None] * len(tokens)
    return tuple(
        (_of_text(text, value), *_likeliest(top)) for text, value, top in zip(tokens, values, likeliest, strict=True)
    )


def _likeliest(top: object) -> Scored:
    """At most one more than was asked for: the token itself, which comes last if it is not among them."""
    if not isinstance(top, dict):
        return ()
    found = [_of_text(text, value) for text, value in list(top.items())[: LOGPROBS_MAX + 1]]
    return tuple(sorted(found, key=lambda one: -one.logprob)[:LOGPROBS_MAX])


def _of_text(text: object, logprob: object, *, special: bool = False) -> Candidate:
    if not isinstance(text, str):
        raise NoLogprobs
    return Candidate(_bounded(text.encode("utf-8", "replace")), _number(logprob), special)


def _bounded(token: bytes) -> bytes:
    if len(token) > TOKEN_BYTES_MAX:
        raise NoLogprobs
    return token


def _number(value: object) -> float:
    """JSON has no minus infinity: of a token that a grammar or a bias rules out, servers say null."""
    if value is None:
        return LEAST_LOGPROB
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise NoLogprobs
    return max(min(float(value), 0.0), LEAST_LOGPROB)


class Placing:
    """Records of one call, each with the place of its token in the whole answer.

    shown: bytes of earlier attempts. again: the call says them again, so its tokens begin at 0 and those are left out.
    """

    def __init__(self, shown: int, *, again: bool) -> None:
        self._shown = shown
        self._at = 0 if again else shown
        self._restarts = shown > 0

    def records(self, scores: Sequence[Scored], top: int) -> bytes:
        found = bytearray()
        for one in scores:
            if self._at >= self._shown:
                if self._restarts:
                    found += encode_restart(self._shown)
                    self._restarts = False
                found += encode_record(TokenLogprobs(self._at, one[0], one[1 : 1 + top]))
            self._at += 0 if one[0].special else len(one[0].token)
        return bytes(found)
