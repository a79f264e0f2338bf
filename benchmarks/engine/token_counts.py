"""How many tokens each chunk of streamed text stands for. Pure.

The stream says only how many there were in all. A chunk may hold several tokens, and its text cut out of the whole
may tokenise a little differently than it was generated: so each chunk is tokenised alone, and what is missing or too
much goes where it changes the rate least, to the longest chunks.
"""

from collections.abc import Callable, Sequence


def tokens_of_chunks(texts: Sequence[str], total: int, count: Callable[[str], int]) -> list[int]:
    """Each at least 1, together `total`. Raises ValueError if there are more chunks than tokens, or no chunk."""
    if not 0 < len(texts) <= total:
        raise ValueError(f"{len(texts)} chunks cannot be {total} tokens")
    counts = [max(1, count(text)) for text in texts]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        order = sorted(range(len(counts)), key=lambda index: counts[index], reverse=True)
        able = [index for index in order if counts[index] + step >= 1]
        for index in able[: abs(missing)]:
            counts[index] += step
    return counts
