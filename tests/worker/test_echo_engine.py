"""The echo engine says the same words on every node and attempt, and plays trouble when asked."""

import asyncio
from typing import Any

import pytest

from bus.ids import ModelName
from bus.jobs import ChatJob, Message
from gpu_worker.echo_engine import RESUME_DIGEST, EchoEngine
from gpu_worker.echo_script import CONTEXT_LENGTH, EchoKnobs
from gpu_worker.engine import GenerateRequest, Piece


def request(
    prompt: str, *, name: str = "c0-1/1.a", forced: bytes = b"", tokens: tuple[int, ...] = (), **job: Any
) -> GenerateRequest:
    chat = ChatJob(model=ModelName("echo"), messages=(Message("user", prompt),), **job)
    return GenerateRequest(name, chat, seed=1, forced_tokens=tokens, forced_text=forced)


class Said:
    """Everything an engine said, driven step by step on a manual clock."""

    def __init__(self, engine: EchoEngine, *requests: GenerateRequest) -> None:
        self.engine = engine
        self.pieces: list[Piece] = []
        for one in requests:
            engine.submit(one)

    def steps(self, until_s: float = 10.0, every_s: float = 0.005) -> "Said":
        for step in range(round(until_s / every_s) + 1):
            self.pieces += self.engine.step(step * every_s)
        return self

    @property
    def text(self) -> bytes:
        return b"".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.tokens)


def engine(**options: Any) -> EchoEngine:
    return EchoEngine(clock=lambda: 0.0, **options)


async def test_it_repeats_the_words_of_the_prompt_in_one_piece_when_it_need_not_wait():
    said = Said(engine(), request("one two three")).steps()

    [piece] = said.pieces
    assert piece.text == b"one two three"
    assert piece.end is not None and piece.end.reason == "stop" and piece.end.new_tokens == 3


async def test_a_no_op_is_one_token():
    said = Said(engine(), request("hello there", max_tokens=1)).steps()

    assert said.text == b"hello"
    assert said.pieces[-1].end is not None and said.pieces[-1].end.reason == "length"


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
async def test_an_attempt_resumed_from_token_ids_says_what_the_first_would_have_said(cut: int):
    """Any echo engine shares the resume digest, so ids of one attempt continue on another node."""
    whole = Said(engine(), request("[[tokens=5 delay_ms=10]] ab cd ef")).steps()
    before = whole.pieces[:cut]
    prefix = b"".join(piece.text for piece in before)
    ids = tuple(token for piece in before for token in piece.tokens)

    rest = Said(engine(), request("[[tokens=5 delay_ms=10]] ab cd ef", forced=prefix, tokens=ids)).steps()

    assert prefix + rest.text == whole.text == b"ab cd ef ab cd"
    assert ids + rest.tokens == whole.tokens
    assert rest.pieces[0].text_offset == len(prefix) and rest.pieces[0].token_offset == cut
    assert (await engine().start()).resume_digest == RESUME_DIGEST


async def test_a_forced_text_without_ids_is_tokenised_again():
    rest = Said(engine(), request("ab cd ef", forced=b"ab cd")).steps()

    assert rest.text == b" ef"
    assert rest.pieces[0].token_offset == 2


async def test_tokens_come_one_by_one_with_the_delay_asked_for_and_late_ones_together():
    slow = engine()
    slow.submit(request("[[delay_ms=100]] a b c d"))
    said = [slow.step(at_s) for at_s in (0.0, 0.05, 0.1, 0.15, 0.4)]

    assert [[piece.text for piece in batch] for batch in said] == [[], [], [b"a"], [], [b" b c d"]]


@pytest.mark.parametrize(("fault", "code"), [("node", "node_error"), ("client", "bad_request")])
async def test_it_fails_where_the_prompt_says_and_blames_whom_it_says(fault: str, code: str):
    said = Said(engine(), request(f"[[fail_at=2 fault={fault}]] a b c d")).steps()

    end = said.pieces[-1].end
    assert said.text == b"a b"
    assert end is not None and (end.reason, end.fault, end.error_code) == ("error", fault, code)


async def test_a_poison_prompt_kills_the_process_at_its_token():
    deaths: list[str] = []
    Said(engine(die=lambda: deaths.append("killed")), request("[[poison=2 delay_ms=5]] a b c d")).steps(0.011)
    assert deaths == []

    Said(engine(die=lambda: deaths.append("killed")), request("[[poison=2 delay_ms=5]] a b c d")).steps(0.016)
    assert deaths == ["killed"]


async def test_a_stalled_engine_makes_no_progress_for_anybody():
    stuck = engine()
    said = Said(stuck, request("[[stall=1 delay_ms=5]] a b", name="x"), request("[[delay_ms=50]] c", name="y")).steps()

    assert said.text == b"a"
    assert not stuck.load().idle


async def test_a_cancelled_sequence_ends_within_a_step_running_or_waiting():
    one = engine(capacity=1)
    said = Said(one, request("[[delay_ms=1000]] a b", name="runs"), request("c", name="waits"))
    said.pieces += one.step(0.0)

    one.cancel("waits")
    one.cancel("runs")
    one.cancel("unknown")
    said.pieces += one.step(0.001)

    assert {piece.sequence: piece.end.reason for piece in said.pieces if piece.end} == {
        "runs": "cancelled",
        "waits": "cancelled",
    }
    assert one.load().idle


async def test_it_never_runs_more_sequences_than_its_capacity():
    one = engine(capacity=2)
    for number in range(5):
        one.submit(request("[[delay_ms=10]] a", name=f"s{number}"))
    one.step(0.0)

    assert (one.load().running, one.load().waiting) == (2, 3)
    assert len(Said(one).steps().pieces) == 5


async def test_a_stop_string_ends_the_answer_before_its_word():
    said = Said(engine(), request("one two three", stop=("tw",))).steps()

    assert said.text == b"one"
    assert said.pieces[-1].end is not None and said.pieces[-1].end.reason == "stop"


async def test_a_prompt_beyond_the_context_is_the_clients_fault():
    said = Said(engine(), request("w " * (CONTEXT_LENGTH + 1))).steps(0)

    end = said.pieces[-1].end
    assert end is not None and (end.fault, end.error_code) == ("client", "context_length_exceeded")


async def test_the_knobs_of_the_settings_hold_where_a_prompt_says_nothing():
    deaths: list[str] = []
    knobs = EchoKnobs(delay_ms=10, first_ms=100, poison="arsenic")
    one = engine(knobs=knobs, die=lambda: deaths.append("killed"))
    one.submit(request("a b", name="slow"))
    one.submit(request("arsenic", name="deadly"))

    assert one.step(0.05) == []
    one.step(0.2)
    assert deaths == ["killed"]


async def test_batches_end_when_the_engine_is_closed():
    one = EchoEngine()
    one.submit(request("a b"))
    heard: list[Piece] = []
    async with asyncio.timeout(5):
        async for batch in one.batches():
            heard += batch
            await one.close()

    assert [piece.text for piece in heard] == [b"a b"]
