"""Text to token ids without stopping the process: a prompt may be megabytes, and its tokens take seconds.

`Tokenizer.encode` holds the GIL, so the steps, the event loop and the beats would stand still meanwhile; the batched
form, here for one text, gives it back.
"""

from tokenizers import Tokenizer

SLICE_CHARS = 1 << 16  # some ten milliseconds of work
LIKELY_CHARS = 4  # of a token; a text with fewer for each token that fits is read whole at once
CUT_TOKENS = 16  # more than a cut in the middle of a word adds to those of both sides
CERTAIN = 1.25  # times what fits: slices need not be split exactly like the whole


def encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """special: add what the tokenizer's own post-processor puts around a text. Raises what tokenizers raises."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def hopeless(tokenizer: Tokenizer, text: str, tokens_max: int) -> int | None:
    """How many tokens the text has at least, if these are surely more than fit and that can be said soon; else None.

    Its first slices are enough: the time goes with what fits, not with the length of the text.
    """
    if len(text) <= LIKELY_CHARS * tokens_max:
        return None
    tokens = 0
    for start in range(0, len(text), SLICE_CHARS):
        tokens += max(0, len(encode(tokenizer, text[start : start + SLICE_CHARS], special=False)) - CUT_TOKENS)
        if tokens > CERTAIN * tokens_max:
            return tokens
    return None
