"""Log probabilities in OpenAI's two shapes: of a chat, and the four lists of the older completions. Pure."""

from collections.abc import Sequence

from bus.codec.logprobs import Candidate, TokenLogprobs


def chat_logprobs(records: Sequence[TokenLogprobs]) -> dict[str, object]:
    content = [{**_candidate(one.chosen), "top_logprobs": [_candidate(top) for top in one.top]} for one in records]
    return {"content": content, "refusal": None}


def completion_logprobs(
    records: Sequence[TokenLogprobs], text: bytes, start: int = 0, chars: int = 0
) -> dict[str, object]:
    """text: the answer from byte `start` on, before which it has `chars` characters. Beside the likeliest tokens the
    chosen one is named too, as OpenAI does."""
    return {
        "tokens": [token_text(one.chosen) for one in records],
        "token_logprobs": [one.chosen.logprob for one in records],
        "top_logprobs": [_by_text(one) for one in records],
        "text_offset": [chars + len(text[: one.at - start].decode("utf-8", "ignore")) for one in records],
    }


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
