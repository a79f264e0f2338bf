"""Guesses of what comes next: how they are found, how far they are trusted, and that they change no answer."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bus.jobs import Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.prompt import Answer, prepare
from gpu_worker.torch_engine.rates import Rates
from gpu_worker.torch_engine.speculation import (
    INDEXED_MAX,
    MATCH_MOST,
    PAUSE_LEAST,
    PAUSE_MOST,
    TRIED_MAX,
    Guesser,
    Lookup,
    Trust,
    Worth,
    agreed,
    judged,
)
from tests.torch_engine.slot_model import SlotModel, slot_engine
from tests.torch_engine.tiny import Outcome, deliver, request, run, tiny_engine, tiny_model

MOST = 8


def guess(text: str, most: int = MOST) -> str:
    return "".join(map(chr, Lookup().guess([ord(char) for char in text], most)))


def test_what_followed_the_last_tokens_before_is_guessed_again() -> None:
    assert guess("to be or not to be or else; to b", 6) == "e or e"


def test_nothing_is_guessed_of_what_was_never_seen() -> None:
    assert guess("abcdefgh") == ""
    assert guess("") == guess("a") == guess("ab") == ""


def test_the_longest_match_counts_and_of_equal_ones_the_latest() -> None:
    assert guess("abcdX..bcdY..abcd", 1) == "X"
    assert guess("bcdX..bcdY..bcd", 1) == "Y"


def test_a_repetition_is_guessed_to_go_on() -> None:
    """The match lies so near the end that what follows it is partly guessed itself."""
    assert guess("..ababab", 5) == "ababa"
    assert guess("x" * 5, 4) == "xxxx"


def slow_guess(tokens: Sequence[int], most: int) -> tuple[int, ...]:
    """The same, obvious: all earlier places of the last two tokens, latest first."""
    places = [n for n in range(1, len(tokens) - 1) if list(tokens[n - 1 : n + 1]) == list(tokens[-2:])][::-1]
    best, found = 0, None
    for place in places[:TRIED_MAX]:
        length = 2
        while length < MATCH_MOST and length <= place and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length > best:
            best, found = length, place + 1
    if found is None:
        return ()
    text = list(tokens)
    for n in range(most):
        text.append(text[found + n])
    return tuple(text[len(tokens) :])


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_sequence_is_guessed_like_one_that_is_seen_at_once(seed: int) -> None:
    """Tokens come one by one, or several at once, or many after a pause: only the new ones are looked at."""
    chance = random.Random(seed)
    tokens = [chance.randrange(4) for _ in range(3)]
    lookup = Lookup()
    for _ in range(60):
        tokens += [chance.randrange(4) for _ in range(chance.choice([0, 1, 1, 3, 20]))]
        most = chance.randrange(1, 9)
        assert lookup.guess(tokens, most) == slow_guess(tokens, most), f"seed {seed}"


def test_a_long_prompt_is_looked_at_over_several_steps() -> None:
    tokens = [*range(100, 100 + INDEXED_MAX), 1, 2, 3, *range(10_000, 10_000 + INDEXED_MAX), 1, 2]
    lookup = Lookup()

    assert [lookup.guess(tokens, 1) for _ in range(3)] == [(), (3,), (3,)]


def judge(trust: Trust, drafted: int, accepted: int, answer_len: int = 0) -> Trust:
    return judged(trust, drafted=drafted, accepted=accepted, most=MOST, answer_len=answer_len)


def test_who_guesses_right_may_guess_more() -> None:
    trust = Trust(width=2)
    for width in (4, 8, 8):
        trust = judge(trust, trust.width, trust.width)
        assert trust.width == width


def test_who_guesses_partly_right_may_guess_one_more_than_that() -> None:
    assert judge(Trust(width=8), 8, 3).width == 4


def test_who_guesses_wrong_is_asked_ever_less_often() -> None:
    trust, answer_len, asked = Trust(width=4), 0, []
    while answer_len < 2000:
        if answer_len >= trust.resume_at:
            asked.append(answer_len)
            trust = judge(trust, trust.width, 0, answer_len)
        answer_len += 1

    assert asked[:3] == [0, 1, 1 + PAUSE_LEAST]
    assert asked[-1] - asked[-2] == PAUSE_MOST
    assert len(asked) < 16
    assert trust.width == 1


def test_one_right_guess_ends_the_pauses() -> None:
    late = Trust(width=1, failures=5, pause=PAUSE_MOST, resume_at=300)

    assert judge(late, 1, 1, 300) == Trust(width=2)


def test_drafts_hold_up_to_the_first_that_was_not_drawn() -> None:
    assert agreed((), (5,)) == 0
    assert agreed((5, 6, 7), (5, 6, 7, 8)) == 3
    assert agreed((5, 6, 7), (5, 9, 7, 8)) == 1
    assert agreed((5, 6), (5, None, 7)) == 1


def test_a_guess_must_bring_what_its_time_would_bring_otherwise() -> None:
    worth = Worth()
    assert worth.pays(answers=1, step_s=0.010, row_s=0.001)  # half a token for a tenth of one
    assert not worth.pays(answers=16, step_s=0.026, row_s=0.001)  # half a token for six tenths of one
    for _ in range(40):
        worth.observe(8, 8)
    assert worth.pays(answers=16, step_s=0.026, row_s=0.001)
    for _ in range(60):
        worth.observe(8, 0)
    assert not worth.pays(answers=1, step_s=0.010, row_s=0.001)
    for _ in range(60):
        worth.observe(0, 0)
    assert worth.pays(answers=1, step_s=0.010, row_s=0.001), "it is tried again"


def test_where_a_row_costs_what_an_answer_costs_nothing_is_guessed(model_dir: Path) -> None:
    """But for the few steps in which the engine learns what a row costs."""

    def drafted(row_s: float) -> int:
        engine = slot_engine(model_dir, speculate=MOST, row_s=row_s)
        run(engine, [request("first", "hello", max_tokens=30)])
        before = engine.core.drafted
        run(engine, [request(str(n), f"{n} hello", max_tokens=40) for n in range(6)])
        return engine.core.drafted - before

    assert drafted(row_s=0.1) < drafted(row_s=0.0001) / 5


class Oracle(Guesser):
    """Guesses what it was told will come, `width` at once; nothing else."""

    def __init__(self, answer: Sequence[int], width: int) -> None:
        super().__init__(width)
        self.answer = answer
        self.width = width

    def guess(self, tokens: Sequence[int], answer_len: int, room: int) -> tuple[int, ...]:
        return tuple(self.answer[answer_len : answer_len + min(room, self.width)])

    def verified(self, drafted: int, accepted: int, answer_len: int) -> None:
        pass


class Untimed(Rates):
    """What a row costs on this machine at this moment must not decide what a test tries."""

    def observe(self, **_: Any) -> None:
        pass


def at_any_price(engine: Assembled) -> None:
    engine.core.rates = Untimed()


def told(engine: Assembled, wanted: GenerateRequest, answer: Sequence[int], width: int) -> Outcome:
    return all_told(engine, [wanted], {wanted.sequence: answer}, width)[wanted.sequence]


def all_told(
    engine: Assembled, wanted: Sequence[GenerateRequest], answers: Mapping[str, Sequence[int]], width: int
) -> dict[str, Outcome]:
    """Run all to the end; what is guessed of each is what `answers` says."""
    outcomes = {one.sequence: Outcome(one) for one in wanted}
    at_any_price(engine)
    for one in wanted:
        prepared = prepare(one, engine.text, context_max=engine.context)
        assert isinstance(prepared, Answer)
        deliver(engine.core.add(prepared), outcomes)
        prepared.sequence.guesser = Oracle(answers[one.sequence], width)
    while not engine.core.idle:
        deliver(engine.core.step().pieces, outcomes)
    assert engine.core.scheduler.pool.free == engine.core.scheduler.pool.total
    return outcomes


def another(token: int) -> int:
    return 70 if token != 70 else 71


def same(one: Outcome, other: Outcome) -> bool:
    return (one.tokens, one.text, one.end) == (other.tokens, other.text, other.end)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_an_answer_ends_where_it_would_whatever_was_accepted_behind(model_dir: Path, width: int) -> None:
    """By its end token, a stop string, max_tokens: each at every place of a run of accepted guesses."""
    free = run(slot_engine(model_dir), [request("a", "hello", max_tokens=40)])["a"]
    letters = free.text.decode()
    for place in range(4, 4 + 2 * width):
        short = request("a", "hello", max_tokens=place)
        stopped = request("a", "hello", max_tokens=40, stop=(letters[place : place + 3],))
        ending = request("a", "hello", max_tokens=40, ignore_eos=False)
        eos = frozenset([free.tokens[place]])
        for wanted, ends in ((short, frozenset[int]()), (stopped, frozenset[int]()), (ending, eos)):
            alone = run(slot_engine(model_dir, eos=ends), [wanted])["a"]
            found = told(slot_engine(model_dir, eos=ends, prefix_cache=True), wanted, free.tokens, width)
            assert same(found, alone), (place, wanted)


def test_right_guesses_save_steps_and_wrong_ones_cost_none(model_dir: Path) -> None:
    wanted = request("a", "hello", max_tokens=41)
    alone = run(tiny_engine(model_dir), [wanted])["a"]
    right, wrong = tiny_engine(model_dir), tiny_engine(model_dir)

    helped = told(right, wanted, alone.tokens, 4)
    hindered = told(wrong, wanted, [another(token) for token in alone.tokens], 4)

    assert same(helped, alone)
    assert same(hindered, alone)
    assert len(helped.pieces) == 1 + 40 // 5
    assert len(hindered.pieces) == 41
    assert (right.core.drafted, right.core.accepted) == (32, 32)
    assert wrong.core.accepted == 0


def test_only_accepted_tokens_are_found_by_other_prompts(model_dir: Path) -> None:
    """A rejected draft fills blocks too; they must not be taken for the content that was guessed."""
    engine = slot_engine(model_dir, block_tokens=4, speculate=0)
    wanted = request("a", "", messages=(), prompt="abcab", max_tokens=30)
    alone = run(slot_engine(model_dir), [wanted])["a"]
    guesses = [token if n % 3 else alone.tokens[0] for n, token in enumerate(alone.tokens)]
    told(engine, wanted, guesses, 8)

    for length in range(1, 30):
        text = "abcab" + alone.text.decode()[:length]
        after = request("b", "", messages=(), prompt=text, max_tokens=8)
        assert same(run(engine, [after])["b"], run(slot_engine(model_dir), [after])["b"]), length


def test_a_guess_with_numbers_that_are_not_finite_spoils_nothing(model_dir: Path) -> None:
    """Its values reach the rows beside it and behind it, since 0 times infinity is not 0: the step is done again."""
    wanted = request("a", "hello", max_tokens=30)
    engine = slot_engine(model_dir)
    alone = run(engine, [wanted])["a"]
    assert isinstance(engine.model, SlotModel)
    engine.model.poison = 5
    guesses = [5 if n % 5 == 3 else token for n, token in enumerate(alone.tokens)]

    assert same(told(engine, wanted, guesses, 4), alone)
    assert engine.core.scheduler.preemptions == 1
    assert same(run(engine, [wanted])["a"], alone), "something of it is left in a block"


def test_an_answer_that_is_not_finite_leaves_what_it_shares_with_others(model_dir: Path) -> None:
    """Its own blocks are cleared; those that have a name were right when they got it, and others read them."""
    engine = slot_engine(model_dir)
    assert isinstance(engine.model, SlotModel)
    good = request("good", "", messages=(), prompt="abcdefghabcdefgh", max_tokens=30)
    bad = request("bad", "", messages=(), prompt="abcdefghabcdQ", max_tokens=30)
    alone = run(slot_engine(model_dir), [good])["good"]
    engine.model.poison = engine.text.encode("Q", special=False)[0]

    found = run(engine, [good, bad])
    after = run(engine, [good])["good"]

    assert found["bad"].end is not None
    assert found["bad"].end.error_code == "node_error"
    assert same(found["good"], alone)
    assert same(after, alone)


SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "sampled": Sampling(temperature=0.7, top_p=0.95),
    "penalised": Sampling(temperature=0.5, frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.1),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_the_same_with_and_without_guesses(model_dir: Path, sampling: str) -> None:
    """Alone, batched, preempted, resumed: the real arithmetic, with rows of guesses beside rows of others."""
    texts = [f"{n} " + "the river and the mill " * (n % 5) + "turn" * (n % 3) for n in range(12)]
    wanted = [request(str(n), t, seed=n, max_tokens=40, sampling=SAMPLINGS[sampling]) for n, t in enumerate(texts)]
    plain = tiny_engine(model_dir, prefix_cache=False)
    alone = {name: o.tokens for one in wanted for name, o in run(plain, [one]).items()}
    halves = [
        request(str(n), t, seed=n, max_tokens=40, sampling=SAMPLINGS[sampling], forced=alone[str(n)][: 3 * n])
        for n, t in enumerate(texts)
    ]

    guesses = {name: [t if n % 7 else another(t) for n, t in enumerate(tokens)] for name, tokens in alone.items()}

    for engine, asked in (
        (tiny_engine(model_dir), wanted),
        (tiny_engine(model_dir, kv_tokens=384, prefill_chunk=50), wanted),
        (tiny_engine(model_dir), halves),
    ):
        found = all_told(engine, asked, guesses, 4)
        assert {name: outcome.tokens for name, outcome in found.items()} == alone
        assert engine.core.accepted > 100


def test_a_greedy_answer_that_repeats_itself_is_guessed(tmp_path: Path) -> None:
    """From the setting to the counters, with the proposer itself; a tied head makes a random model repeat itself."""
    directory = tiny_model(tmp_path, tie_word_embeddings=True)
    wanted = [request(str(n), f"{n} hello", max_tokens=60) for n in range(4)]
    plain, guessing = tiny_engine(directory), tiny_engine(directory, speculate=MOST)
    at_any_price(guessing)

    found = run(guessing, wanted)

    assert {name: o.tokens for name, o in found.items()} == {name: o.tokens for name, o in run(plain, wanted).items()}
    load = guessing.core.load()
    assert load.drafted >= load.accepted > 20
    assert sum(len(outcome.pieces) for outcome in found.values()) == 4 * 60 - load.accepted
