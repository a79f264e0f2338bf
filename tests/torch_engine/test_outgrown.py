"""An end that only the context made is marked, and says nothing that the answer may not go on behind."""

from pathlib import Path
from typing import Any

import pytest

from gpu_worker.engine import End, GenerateRequest
from gpu_worker.torch_engine.prompt import outgrows
from tests.torch_engine.test_bridge import all_ended, collect, running
from tests.torch_engine.tiny import Outcome, request

SMALL, BIG = 64, 256
PROMPTS = tuple("x" * count for count in range(1, 17))


async def answers(model_dir: Path, kv_tokens: int, *asked: GenerateRequest) -> list[Outcome]:
    async with running(model_dir, kv_tokens=kv_tokens) as engine:
        wanted = list(asked)
        for one in wanted:
            engine.submit(one)
        seen = await collect(engine, wanted, until=all_ended)
    return [seen[one.sequence] for one in wanted]


def end_of(outcome: Outcome) -> End:
    assert outcome.end is not None
    return outcome.end


async def test_what_outgrew_a_small_context_goes_on_at_a_large_one_as_if_it_had_been_there_from_the_start(
    model_dir: Path,
) -> None:
    """A random model's bytes: many of these stop within a character."""
    asked = [request(prompt, prompt, max_tokens=100) for prompt in PROMPTS]
    first = await answers(model_dir, SMALL, *asked)
    resumed = [
        request(prompt, prompt, max_tokens=100, forced=outcome.tokens, shown=outcome.text)
        for prompt, outcome in zip(PROMPTS, first, strict=True)
    ]
    whole = await answers(model_dir, BIG, *asked)

    rest = await answers(model_dir, BIG, *resumed)

    assert any(end_of(one).tail for one in first)
    for before, after, alone in zip(first, rest, whole, strict=True):
        assert (end_of(before).reason, end_of(before).outgrown) == ("length", True)
        assert alone.text.startswith(before.text)
        assert (after.text, after.tokens) == (alone.text, alone.tokens)
        assert end_of(after) == end_of(alone)
        assert not end_of(alone).outgrown and end_of(alone).new_tokens == 100


async def test_half_a_stop_string_at_the_seam_is_held_back_until_it_ends_here(model_dir: Path) -> None:
    (free,) = await answers(model_dir, BIG, request("a", "hello", max_tokens=100))
    (cut,) = await answers(model_dir, SMALL, request("a", "hello", max_tokens=100))
    text = free.text.decode()
    seam = len(cut.text.decode())
    stop = text[seam - 1 : seam + 3]
    assert text.index(stop) == seam - 1
    asked: dict[str, Any] = {"max_tokens": 100, "stop": (stop,)}

    (before,) = await answers(model_dir, SMALL, request("a", "hello", **asked))
    (after,) = await answers(model_dir, BIG, request("a", "hello", forced=before.tokens, shown=before.text, **asked))

    assert end_of(before).outgrown and (before.text + end_of(before).tail).startswith(cut.text)
    assert after.text.decode() == text[: seam - 1]
    assert end_of(after).reason == "stop"


async def test_a_stored_answer_that_does_not_fit_says_nothing_before_it_ends_here(model_dir: Path) -> None:
    (long,) = await answers(model_dir, BIG, request("a", "hello", max_tokens=100))
    shown = long.text[: len(long.text.decode()[:20].encode())]
    resumed = request("a", "hello", max_tokens=200, forced=long.tokens, shown=shown)

    (here,) = await answers(model_dir, SMALL, resumed)

    assert (here.text, here.tokens) == (shown, long.tokens), "no more than was brought"
    assert (end_of(here).reason, end_of(here).outgrown, end_of(here).new_tokens) == ("length", True, 100)
    assert (shown + end_of(here).tail).startswith(long.text.rstrip(b"\xef\xbf\xbd"))


async def test_a_refused_prompt_and_an_answer_at_its_max_tokens(model_dir: Path) -> None:
    prompt, answer = await answers(
        model_dir, SMALL, request("long", "word " * 60), request("short", "hello", max_tokens=3)
    )

    assert (end_of(prompt).error_code, end_of(prompt).outgrown) == ("context_length_exceeded", True)
    assert (end_of(answer).reason, end_of(answer).outgrown) == ("length", False)


@pytest.mark.parametrize(
    ("max_tokens", "outgrown"), [(None, True), (54, False), (55, True), (1, False)], ids=lambda value: str(value)
)
def test_max_tokens_that_just_fit_are_not_the_contexts_end(max_tokens: int | None, outgrown: bool) -> None:
    assert outgrows(10, max_tokens, SMALL) is outgrown
