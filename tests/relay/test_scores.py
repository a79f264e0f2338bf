"""Log probabilities of HTTP nodes: both shapes read, placed in the text, and nothing believed that makes no sense."""

from typing import Any

import pytest

from bus.codec.logprobs import Candidate, shown_records
from bus.jobs import Sampling
from gpu_worker.relay_engine import speaker
from gpu_worker.relay_engine.faults import NoLogprobs
from gpu_worker.relay_engine.scores import Placing, read_scores
from tests.conftest import wait_until
from tests.harness.fake_openai import FakeNode
from tests.relay.test_engine import Bench, Result, bench, expected, node, session

__all__ = ["bench", "node", "session"]  # fixtures


def entry(token: str = "mill", logprob: Any = -0.5, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())} | more


def test_a_chats_entries_are_tokens_with_the_likeliest() -> None:
    half = entry("\\xe2", bytes=[0xE2], top_logprobs=[entry("a", -0.1), entry("b", -2)])
    special = entry("<|im_end|>", bytes=None)

    assert read_scores({"content": [half, special, entry("x", -1e30)], "refusal": None}) == (
        (Candidate(b"\xe2", -0.5), Candidate(b"a", -0.1), Candidate(b"b", -2.0)),
        (Candidate(b"<|im_end|>", -0.5, special=True),),
        (Candidate(b"x", -9999.0),),
    )


def test_the_older_lists_are_read_too() -> None:
    lists = {"tokens": ["a", "b"], "token_logprobs": [-1, -2], "top_logprobs": [{"c": -3, "a": -1}, None]}

    assert read_scores(lists) == (
        (Candidate(b"a", -1.0), Candidate(b"a", -1.0), Candidate(b"c", -3.0)),
        (Candidate(b"b", -2.0),),
    )


def test_null_is_minus_infinity() -> None:
    """As servers say it in JSON of what a grammar or a bias rules out."""
    ruled_out = {"content": [entry(top_logprobs=[entry("x", None)]), entry("y", None, bytes=None)]}
    lists = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [{"c": None}]}

    assert read_scores(ruled_out) == (
        (Candidate(b"mill", -0.5), Candidate(b"x", -9999.0)),
        (Candidate(b"y", -9999.0),),
    )
    assert read_scores(lists) == ((Candidate(b"a", -9999.0), Candidate(b"c", -9999.0)),)


@pytest.mark.parametrize("nothing", [None, {}, {"content": None}, "x", []])
def test_a_node_may_tell_none(nothing: Any) -> None:
    assert read_scores(nothing) is None


@pytest.mark.parametrize(
    "found",
    [
        {"content": [5]},
        {"content": [entry() | {"token": 5}]},
        {"content": [entry(logprob="-1")]},
        {"content": [{"token": "mill"}]},
        {"content": [entry(logprob=True)]},
        {"content": [entry(logprob=float("nan"))]},
        {"content": [entry(bytes=[256])]},
        {"content": [entry(bytes="x")]},
        {"content": [entry(bytes=[True])]},
        {"content": [entry("x" * 2000)]},
        {"content": [entry(top_logprobs=5)]},
        {"content": [entry(top_logprobs=[None])]},
        {"tokens": ["a"]},
        {"tokens": ["a"], "token_logprobs": [-1, -2]},
        {"tokens": [5], "token_logprobs": [-1]},
    ],
)
def test_what_makes_no_sense_fails_the_call(found: Any) -> None:
    with pytest.raises(NoLogprobs):
        read_scores(found)


def test_tokens_that_were_shown_before_are_left_out() -> None:
    scores = read_scores({"content": [entry("ab"), entry("cd"), entry("ef")]})
    assert scores is not None

    said_again = shown_records(Placing(4, again=True).records(scores, 0), 6)
    went_on = shown_records(Placing(4, again=False).records(scores[2:], 0), 6)

    assert [(one.at, one.chosen.token) for one in said_again] == [(4, b"ef")]
    assert went_on == said_again


def log_of(result: Result) -> list[tuple[int, bytes, float, int]]:
    raw = b"".join(piece.logprobs for piece in result.pieces)
    return [(one.at, one.chosen.token, one.chosen.logprob, len(one.top)) for one in shown_records(raw, 10_000)]


@pytest.mark.parametrize("job", [{}, {"stream": False}, {"prompt": "Tell me about mills", "messages": ()}])
async def test_they_come_through_beside_the_text(bench: Bench, node: FakeNode, job: dict[str, Any]) -> None:
    node.turn(logprobs=True)

    result = await bench.run(logprobs=1, **job)

    records = log_of(result)
    assert result.text == expected() == b"".join(token for _, token, _, _ in records)
    assert [at for at, *_ in records] == [len(result.text[:at]) for at, *_ in records]
    assert {(value, top) for *_, value, top in records} == {(-1.0, 1)}


async def test_they_go_on_behind_the_text_of_an_earlier_attempt(bench: Bench, node: FakeNode) -> None:
    node.turn(logprobs=True)
    shown = expected(5)

    result = await bench.run(shown, logprobs=1)

    records = log_of(result)
    assert records[0][0] == len(shown)
    assert b"".join(token for _, token, _, _ in records) == expected()[len(shown) :]


async def test_a_node_that_gives_none_is_unable_and_keeps_its_good_record(bench: Bench, node: FakeNode) -> None:
    """However often it is asked: its breaker is not for clients to open."""
    for turn in range(6):
        bench.submit(f"s{turn}", logprobs=0)
        end = (await bench.result(f"s{turn}")).end

        assert (end.reason, end.error_code, end.fault) == ("error", "unsupported", "")
        assert (end.unable, end.lacks) == (True, "logprobs")


async def test_a_node_that_gave_some_is_unable_for_one_job_only(bench: Bench, node: FakeNode) -> None:
    """One odd request must not take log probabilities from everybody."""
    node.turn(logprobs=True)
    await bench.run(logprobs=1)
    node.turn(logprobs=False)

    bench.submit("s2", logprobs=0)
    end = (await bench.result("s2")).end

    assert (end.unable, end.lacks) == (True, None)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_node_whose_answer_goes_wrong_in_the_middle_is_unable_for_one_job_only(
    bench: Bench, node: FakeNode, stream: bool
) -> None:
    """Its first answer ever, and also where nothing is shown before the end: the records before were good."""
    node.turn(logprobs=True, delay_ms=30)
    bench.submit("s1", logprobs=1, stream=stream)
    await wait_until(lambda: bool(node.calls) and node.calls[0].tokens_sent >= 3)
    node.turn(logprobs=False, scores={"content": [5]})

    end = (await bench.result("s1")).end

    assert (end.error_code, end.unable, end.lacks) == ("unsupported", True, None)


async def test_an_answer_without_text_shows_nothing_of_what_a_node_can(bench: Bench, node: FakeNode) -> None:
    node.turn(answer="")
    bench.submit("s1", logprobs=1)
    empty = await bench.result("s1")
    node.turn(answer=None)

    bench.submit("s2", logprobs=1)
    end = (await bench.result("s2")).end

    assert (empty.text, empty.end.reason) == (b"", "stop")
    assert (end.unable, end.lacks) == (True, "logprobs")


@pytest.mark.parametrize(("logprobs", "unable"), [(1, True), (None, False)])
async def test_a_refusal_that_speaks_of_them_is_of_one_job_only(
    bench: Bench, node: FakeNode, logprobs: int | None, unable: bool
) -> None:
    node.turn(status=400, error_message="Requested logprobs of 20, which is greater than max allowed: 5")

    end = (await bench.run(logprobs=logprobs)).end

    assert (end.unable, end.lacks) == (unable, None)
    assert "greater than max allowed" in end.error_message


MALFORMED = [{"tokens": ["hi"], "token_logprobs": None}, {"content": [entry(logprob="-1")]}, {"content": [5]}]


@pytest.mark.parametrize("scores", MALFORMED)
async def test_what_nobody_asked_for_is_not_read(bench: Bench, node: FakeNode, scores: Any) -> None:
    node.turn(scores=scores)

    result = await bench.run()

    assert (result.text, result.end.reason) == (expected(), "length")


@pytest.mark.parametrize("scores", MALFORMED)
async def test_what_makes_no_sense_ends_the_job_as_if_there_were_none(
    bench: Bench, node: FakeNode, scores: Any
) -> None:
    node.turn(scores=scores)

    end = (await bench.run(logprobs=0)).end

    assert (end.reason, end.error_code, end.unable) == ("error", "unsupported", True)


async def test_more_than_an_answer_may_have_is_not_kept(
    bench: Bench, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a node could fill the relay's memory with an answer that is kept until its end."""
    monkeypatch.setattr(speaker, "LOGPROBS_BYTES_MAX", 100)
    node.turn(logprobs=True, delay_ms=10)

    result = await bench.run(logprobs=1, stream=False)

    assert sum(bool(piece.logprobs) for piece in result.pieces) > 1, "it went out before the end"
    assert result.text == expected() == b"".join(token for _, token, _, _ in log_of(result))


async def test_penalties_and_biases_reach_the_node(bench: Bench, node: FakeNode) -> None:
    await bench.run(sampling=Sampling(presence_penalty=0.5, min_p=0.1, logit_bias=((5, -1.0),)))

    body = node.calls[-1].body
    assert (body["presence_penalty"], body["min_p"], body["logit_bias"]) == (0.5, 0.1, {"5": -1.0})
    assert "frequency_penalty" not in body
    assert "logprobs" not in body
