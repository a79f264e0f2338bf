"""What the engine says of its speed and its room, and how many prompt tokens a step takes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.torch_engine.least_chunk import SHORTEST
from gpu_worker.torch_engine.rates import CHUNK_MOST_S, CHUNK_S, STALL, Rates, capacity_now, first_tokens
from gpu_worker.torch_engine.step_time import Piece, load_of
from tests.torch_engine.machine import COMPILED, CPU, GRAPHS, LARGE, Machine, budget, gaps_beside_a_prompt, warmed_up

ANSWERS: list[Piece] = [(100, 1)] * 4


def served(rates: Rates, machine: Machine, decode: list[Piece], prefill: list[Piece], times: int = 1) -> None:
    for _ in range(times):
        rates.observe(decode=decode, prefill=prefill, seconds=machine.takes_s(load_of(decode, prefill)))


def busy_rates(machine: Machine) -> Rates:
    """After a while of answers and prompts, apart and together."""
    rates = Rates()
    for step in range(60):
        served(rates, machine, [], [(0, 100 + step)])
        served(rates, machine, [(100 + step, 1)] * (1 + step % 6), [])
        served(rates, machine, [(100 + step, 1)] * 4, [(step * 10, 10 + step)])
    return rates


def test_nothing_is_claimed_before_anything_was_measured():
    rates = Rates()

    assert (rates.prefill_rate, rates.decode_rate([]), rates.decode_rate(ANSWERS)) == (0.0, 0.0, 0.0)


def test_the_decode_rate_is_that_of_the_present_batch_at_once():
    """A node that ran eight a moment ago and runs one now must not look as if one went as fast as eight."""
    machine = Machine(*CPU, noise=0.0)
    rates = busy_rates(machine)

    for count in (1, 4, 8):
        answers: list[Piece] = [(120, 1)] * count
        assert rates.decode_rate(answers) == pytest.approx(count / machine.usual_s(load_of(answers)), rel=0.1)


def test_of_a_mixed_step_each_kind_of_work_gets_its_share():
    """The dispatcher adds the two waits, so no second may count in both rates or in none."""
    machine = Machine(*CPU, noise=0.0)
    rates = busy_rates(machine)
    prompt: list[Piece] = [(200, 64)]

    served(rates, machine, ANSWERS, prompt, 200)
    together_s = machine.usual_s(load_of(ANSWERS, prompt))

    assert 4 / rates.decode_rate(ANSWERS) + 64 / rates.prefill_rate == pytest.approx(together_s, rel=0.1)


def test_short_ends_of_prompts_hardly_count():
    """A prompt's last four tokens take a step of their own; their few tokens a second are not the engine's speed."""
    machine = Machine(*CPU, noise=0.0)
    rates = busy_rates(machine)
    before = rates.prefill_rate

    for _ in range(20):
        served(rates, machine, [], [(0, 256)])
        served(rates, machine, [], [(256, 4)])

    assert rates.prefill_rate == pytest.approx(before, rel=0.15)


def test_long_prompts_lower_the_rate_as_much_as_they_cost():
    machine = Machine(*CPU, noise=0.0)
    rates = busy_rates(machine)

    served(rates, machine, [], [(6000, 256)], 40)

    assert rates.prefill_rate == pytest.approx(256 / machine.usual_s(load_of([], [(6000, 256)])), rel=0.05)


def test_accepted_drafts_count_as_decoded():
    """A piece of four rows of which three tokens came out is as good as three steps, and takes what four rows take."""
    machine = Machine(*CPU, noise=0.0)
    rates = busy_rates(machine)
    drafted: list[Piece] = [(100, 4)]

    for _ in range(100):
        rates.observe(decode=drafted, prefill=[], new_tokens=3, seconds=machine.takes_s(load_of(drafted)))

    assert rates.decode_rate(drafted) == pytest.approx(3 / machine.usual_s(load_of(drafted)), rel=0.1)


def test_an_idle_engine_keeps_its_rates():
    rates = busy_rates(Machine(*CPU))
    before = rates.prefill_rate, rates.decode_rate([])

    rates.observe(decode=[], prefill=[], seconds=3600.0)

    assert (rates.prefill_rate, rates.decode_rate([])) == before
    assert min(before) > 0


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9)), max_size=20),
            st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 512)), max_size=4),
            st.sampled_from([0.0, -1.0, 1e-9, 1e-3, 0.1, 30.0, 1e6, math.inf, math.nan]),
        ),
        max_size=30,
    )
)
def test_no_history_makes_a_figure_that_is_none(steps: list[tuple[list[Piece], list[Piece], float]]):
    """A clock that jumped, a machine that slept: rates stay finite and above zero, and prompts get on."""
    rates = Rates()
    for decode, prefill, seconds in steps:
        rates.observe(decode=decode, prefill=prefill, seconds=seconds)

    figures = rates.prefill_rate, rates.decode_rate([]), rates.decode_rate(ANSWERS)

    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)
    assert 0 <= budget(rates, ANSWERS, [(0, 900)]) <= 512  # 0: the answers alone are to be measured


def test_without_answers_a_chunk_is_as_long_as_half_a_second():
    known = warmed_up(Machine(*CPU))

    tokens = budget(known, [], [(0, 2000)])

    assert known.step_time.expected_s(load_of([], [(0, tokens)])) == pytest.approx(CHUNK_S, rel=0.02)
    assert budget(known, [], [(0, 2000)], chunk_max=64) == 64


def test_an_unmeasured_engine_takes_whole_chunks():
    """Its first prompt has nobody to stall."""
    assert budget(Rates(), [], [(0, 2000)]) == 512


def test_a_burst_of_prompts_goes_before_the_few_that_already_answer():
    """Else one early answer would hold up thirty who wait for their first token; but nobody waits for long."""
    known = warmed_up(Machine(*CPU, noise=0.0))
    burst: list[Piece] = [(0, 400)] * 31

    def extra_s(arriving: int) -> float:
        tokens = budget(known, ANSWERS[:1], burst[:arriving])
        alone_s = known.step_time.expected_s(load_of(ANSWERS[:1]))
        return known.step_time.expected_s(load_of(ANSWERS[:1], first_tokens(burst, tokens))) - alone_s

    assert extra_s(1) < extra_s(3) < extra_s(31)
    assert CHUNK_S * 0.97 < extra_s(31) <= CHUNK_S


def test_an_answer_that_has_just_begun_waits_for_those_it_came_with():
    known = warmed_up(Machine(*CPU, noise=0.0))
    burst: list[Piece] = [(0, 100)] * 2

    assert budget(known, ANSWERS[:2], burst, settled=0) >= 100
    assert budget(known, ANSWERS[:2], burst, settled=1) < 60
    assert budget(known, ANSWERS[:2], burst, settled=2) < 30


def test_a_step_ends_with_a_prompt_where_that_is_about_as_fast():
    """The first token of one need not wait for half of the next."""
    machine = Machine(*CPU, noise=0.0)
    known = warmed_up(machine)
    for count in (8, 16, 64, 128, 190):
        machine.observed(known, [], [(0, count)])

    def tokens(*counts: int) -> int:
        return budget(known, [], [(0, count) for count in counts])

    assert tokens(128, 128, 128) == 128
    assert tokens(8, 150, 150) == 158  # a step of 8 would be mostly its start
    assert 180 < tokens(8, 2000) < 200  # so would it be here, and the other's end is too far away
    assert tokens(4, 4) == 8


def test_a_long_context_makes_chunks_shorter():
    machine = Machine(0.005, 0.0005, 0.0002, 1e-6, 2e-6, noise=0.0)
    known = warmed_up(machine)
    for start in range(0, 4000, 100):
        machine.observed(known, ANSWERS, [(start, 20)])
    machine.observed(known, ANSWERS, [])

    chunks = [budget(known, ANSWERS, [(at, 500)]) for at in (0, 500, 2000)]

    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > 3 * chunks[-1]


def test_however_slow_a_prompt_gets_on():
    machine = Machine(1e-6, 10.0, 0.0, 0.0, 0.0, noise=0.0)
    known = warmed_up(machine)

    assert budget(known, ANSWERS, [(0, 2000)]) == SHORTEST


@pytest.mark.parametrize("answers", [1, 16])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("chunk_s", [0.0003, 0.00095, 0.00105, 0.00115, 0.0025])
def test_whatever_a_chunk_costs_a_prompt_gets_on(chunk_s: float, noise: float, answers: int):
    """Also where that is nearly, just or more than all that was promised: not two thousand chunks of one token."""
    start, token, _, read, score = GRAPHS
    machine = Machine(start, token, chunk_s, read, score, noise=noise, seed=3)
    alone, shortest = load_of([(130, 1)] * answers), load_of([(130, 1)] * answers, [(0, SHORTEST)])

    gaps = gaps_beside_a_prompt(machine, answers, 2000)

    assert len(gaps) < (500 if noise > 0.05 else 200)
    promised = max(1 + STALL, 1.4 * machine.usual_s(shortest) / machine.usual_s(alone))
    assert gaps[math.ceil(0.9 * len(gaps)) - 1] < promised * math.exp(2 * noise)


def test_one_late_step_does_not_make_a_slow_node():
    """A machine that slept: the dispatcher would give it no prompts, and so it would never be measured again."""
    machine = Machine(*COMPILED, seed=5)
    known = busy_rates(machine)
    prefill_rate, decode_rate = known.prefill_rate, known.decode_rate(ANSWERS)

    known.observe(decode=[], prefill=[(0, 256)], seconds=60.0)

    assert known.prefill_rate > 0.8 * prefill_rate
    assert known.decode_rate(ANSWERS) > 0.8 * decode_rate


@pytest.mark.parametrize("stall", [1.0, 2.0])
def test_a_device_may_promise_more(stall: float):
    known = warmed_up(Machine(*CPU, noise=0.0))
    known.stall = stall

    tokens = budget(known, ANSWERS, [(0, 500)])

    extra_s = known.step_time.expected_s(load_of(ANSWERS, [(0, tokens)])) - known.step_time.expected_s(load_of(ANSWERS))
    assert 0.2 < extra_s / known.step_time.expected_s(load_of(ANSWERS)) < stall


def test_where_a_step_takes_long_whatever_its_tokens_a_lone_prompt_takes_more_of_them():
    """Half a second a step would be half of it for reading weights."""
    machine = Machine(*LARGE, seed=4)
    known = warmed_up(machine)
    taken_s, done = 0.0, 0
    while done < 200:
        tokens = budget(known, [], [(done, 200 - done)])
        taken_s += (last_s := machine.observed(known, [], [(done, tokens)]))
        assert last_s < 1.2 * CHUNK_MOST_S
        done += tokens

    assert taken_s < 1.4 * machine.usual_s(load_of([], [(0, 200)]))


def test_several_prompts_share_a_chunk_in_their_order():
    assert list(first_tokens([(0, 5), (32, 7), (0, 9)], 10)) == [(0, 5), (32, 5)]
    assert list(first_tokens([(0, 5)], 10)) == [(0, 5)]


def test_capacity_follows_free_blocks():
    def capacity(**changes: float) -> int:
        plain = {"slots": 8, "running": 2, "waiting": 0, "free_tokens": 10_000, "waiting_tokens": 0}
        return capacity_now(**(plain | {"sequence_tokens": 500} | changes))  # type: ignore[arg-type] # whole numbers

    assert capacity() == 8
    assert capacity(free_tokens=1_600) == 5
    assert capacity(free_tokens=0) == 2
    assert capacity(free_tokens=1_600, waiting=2, waiting_tokens=1_000) == 2 + 2 + 1
    assert capacity(free_tokens=1_000, waiting=4, waiting_tokens=4_000) == 2 + 1, "three of the waiting do not fit"


@given(
    slots=st.integers(1, 64),
    running=st.integers(0, 64),
    waiting=st.integers(0, 5000),
    free_tokens=st.integers(0, 1 << 20),
    waiting_tokens=st.integers(0, 1 << 24),
    sequence_tokens=st.floats(0, 1e6),
)
def test_capacity_is_never_above_the_slots_and_never_nothing(slots: int, **numbers: float):
    assert 1 <= capacity_now(slots=slots, **numbers) <= slots  # type: ignore[arg-type] # drawn as they should be
