"""Log probabilities in OpenAI's two shapes: of a chat, and the four lists of the older completions. Pure."""

import codecs
from collections.abc import AsyncIterator, Sequence

import orjson

from bus.codec.logprobs import Candidate, TokenLogprobs

Slices = AsyncIterator[Sequence[TokenLogprobs]]


class TextPlaces:
    """Where bytes of a text are in characters, asked for in rising order."""

    def __init__(self, text: bytes, start: int = 0, chars: int = 0) -> None:
        """text: the answer from byte `start` on, before which it has `chars` characters."""
        self._text = text
        self._at = self._start = start
        self._chars = chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def chars(self, at: int) -> int:
        if at > self._at:
            self._chars += len(self._decoder.decode(self._text[self._at - self._start : at - self._start]))
            self._at = at
        return self._chars


def chat_logprobs(records: Sequence[TokenLogprobs]) -> dict[str, object]:
    return {"content": _content(records), "refusal": None}


def completion_logprobs(records: Sequence[TokenLogprobs], places: TextPlaces) -> dict[str, list[object]]:
    """Beside the likeliest tokens the chosen one is named too, as OpenAI does."""
    return {
        "tokens": [token_text(one.chosen) for one in records],
        "token_logprobs": [one.chosen.logprob for one in records],
        "top_logprobs": [_by_text(one) for one in records],
        "text_offset": [places.chars(one.at) for one in records],
    }


async def chat_fragment(slices: Slices) -> orjson.Fragment:
    """JSON of `chat_logprobs` of a whole answer, made part by part: in one go it would hold up all other requests."""
    parts = [orjson.dumps(_content(records))[1:-1] async for records in slices if records]
    return orjson.Fragment(b'{"content":[' + b",".join(parts) + b'],"refusal":null}')


async def completion_fragment(slices: Slices, text: bytes) -> orjson.Fragment:
    """The same of `completion_logprobs`."""
    places = TextPlaces(text)
    lists: dict[str, list[bytes]] = {name: [] for name in completion_logprobs((), places)}
    async for records in slices:
        for name, values in completion_logprobs(records, places).items():
            if values:
                lists[name].append(orjson.dumps(values)[1:-1])
    return orjson.Fragment(orjson.dumps({name: _joined(parts) for name, parts in lists.items()}))


def _joined(parts: Sequence[bytes]) -> orjson.Fragment:
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


def _content(records: Sequence[TokenLogprobs]) -> list[dict[str, object]]:
    return [{**_candidate(one.chosen), "top_logprobs": [_candidate(top) for top in one.top]} for one in records]


def token_text(one: Candidate) -> str:
    """A part of a character is written as OpenAI does: `\\xe2\\x82`."""
    return one.token.decode("utf-8", "backslashreplace")


def _candidate(one: Candidate) -> dict[str, object]:
    return {
        "token": token_text(one),
        "logprob": one.logprob,
        "bytes": None if one.special else list(one.token),
    }


def _by_text(record: TokenLogprobs) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in (*record.top, record.chosen):
        found.setdefault(token_text(one), one.logprob)
    return found
