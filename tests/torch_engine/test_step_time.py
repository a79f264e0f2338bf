"""What a step will take, learned from made-up machines: noise, late steps, changes of speed, next to no steps."""

import math

import pytest

from gpu_worker.torch_engine.step_time import Load, Piece, StepTime, load_of
from tests.torch_engine.machine import BENDS, BENT, COMPILED, CPU, DEEP, GPU, Machine, gaps_beside_a_prompt, warmed_up

PROMPT: list[Piece] = [(600, 90)]


def wrong_by(machine: Machine, known: StepTime, load: Load) -> float:
    """The factor between what is expected and what such a step usually takes."""
    return math.exp(abs(math.log(known.expected_s(load) / machine.usual_s(load))))


def seen_everything(machine: Machine, steps: int = 200) -> StepTime:
    known = StepTime()
    for step in range(steps):
        answers = [(50 + step + 40 * each, 1) for each in range(1 + step % 9)]
        machine.step(known, answers, [(step * 31 % 2000, 5 + step * 17 % 120)] if step % 2 else [])
    return known


def test_pieces_are_counted_as_what_they_cost():
    load = load_of(decode=[(9, 1), (19, 1)], prefill=[(100, 4)])

    assert load == Load(tokens=6, chunks=1, keys=10 + 20 + 104, pairs=10 + 20 + 4 * 102.5)


@pytest.mark.parametrize("costs", [CPU, COMPILED, DEEP, GPU])
def test_all_kinds_of_machines_are_learned(costs: tuple[float, ...]):
    """From microseconds to seconds a step: no unit and no constant of a machine is built in."""
    for scale in (1e-3, 1.0, 100.0):
        machine = Machine(*(scale * cost for cost in costs), noise=0.05, seed=1)
        known = seen_everything(machine)

        for load in (load_of([(200, 1)] * 4), load_of([(200, 1)] * 4, [(1000, 40)]), load_of([], [(0, 100)])):
            assert wrong_by(machine, known, load) < 1.15


def test_one_step_is_enough_for_a_first_guess_and_its_doubt_is_known():
    machine = Machine(*CPU, noise=0.0)
    known = StepTime()
    machine.step(known, [(60, 1)], [])

    assert wrong_by(machine, known, load_of([(60, 1)])) < 1.05
    assert known.doubt(load_of([(60, 1)])) < 0.2
    assert known.doubt(load_of([], PROMPT)) > 0.5


def test_late_steps_are_no_news():
    """One step in twenty takes up to eight times as long; the usual one is what counts."""
    machine = Machine(*CPU, noise=0.05, outliers=0.05, seed=2)
    known = seen_everything(machine)

    assert wrong_by(machine, known, load_of([(200, 1)] * 4, PROMPT)) < 1.25
    assert known.noise < 0.2


@pytest.mark.parametrize("speed", [0.3, 0.5, 2.0, 4.0])
def test_a_new_speed_is_believed_within_a_few_steps_also_for_what_did_not_run(speed: float):
    """Answers run on while a neighbour comes or goes: prompts will be slower or faster by as much."""
    machine = Machine(*CPU, seed=3)
    known = seen_everything(machine)
    machine.speed = speed

    for _ in range(8):
        machine.step(known, [(200, 1)] * 4, [])

    assert wrong_by(machine, known, load_of([(200, 1)] * 4)) < 1.15
    assert wrong_by(machine, known, load_of([], PROMPT)) < 1.3


def test_thousands_of_steps_without_a_prompt_do_not_unlearn_it():
    machine = Machine(*CPU, seed=4)
    known = seen_everything(machine)

    for _ in range(3_000):
        machine.step(known, [(200, 1)] * 4, [])

    assert wrong_by(machine, known, load_of([], PROMPT)) < 1.3
    assert math.isfinite(known.doubt(load_of([], PROMPT)))


def test_rows_may_cost_little_then_much_then_less():
    machine = Machine(*BENT, bends=BENDS, noise=0.02, seed=7)
    known = StepTime()
    for step in range(300):
        answers = [(100 + step, 1)] * (1 + step % 4)
        machine.step(known, answers, [(step * 31 % 1000, 1 + step * 17 % 40)] if step % 2 else [])

    for rows in (1, 2, 3, 5, 8, 12, 24, 40):
        assert wrong_by(machine, known, load_of([(200, 1)] * rows)) < 1.1


def test_doubt_of_a_comparison_leaves_out_the_speed_of_the_machine():
    known = warmed_up(Machine(*CPU, seed=8)).step_time
    one, two = load_of([(200, 1)] * 4), load_of([(200, 1)] * 5)

    assert known.doubt(two, one) < known.doubt(two) / 2
    assert known.doubt(two, two) == 0
    assert known.doubt(load_of([], [(600, 200)]), one) > known.doubt(two, one)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_learned(seconds: float):
    known = warmed_up(Machine(*CPU)).step_time
    before = known.expected_s(load_of([], PROMPT))

    known.observe(load_of([], PROMPT), seconds)

    assert known.expected_s(load_of([], PROMPT)) == before


@pytest.mark.parametrize(
    ("costs", "bends"), [(CPU, ()), (COMPILED, ()), (DEEP, ()), (GPU, ()), (BENT, BENDS)], ids=repr
)
@pytest.mark.parametrize("answers", [1, 2, 4, 16])
def test_a_long_prompt_stalls_answers_by_two_of_their_intervals_at_most(
    costs: tuple[float, ...], bends: tuple[tuple[int, float], ...], answers: int
):
    """The promise, on a machine whose steps vary by 3 % and that was seen in a warm-up of twelve steps only."""
    for seed in range(2):
        machine = Machine(*costs, bends=bends, seed=seed)
        gaps = gaps_beside_a_prompt(machine, answers, 2000)

        assert gaps[len(gaps) // 2] < 2.8
        assert gaps[math.ceil(0.99 * len(gaps)) - 1] < 3.0


@pytest.mark.parametrize("costs", [CPU, COMPILED])
def test_prompts_use_what_the_promise_leaves_them(costs: tuple[float, ...]):
    machine = Machine(*costs)

    gaps = gaps_beside_a_prompt(machine, 4, 2000)

    assert gaps[len(gaps) // 2] > 2.4


@pytest.mark.parametrize("slower_at", [0, 10, 60])
def test_a_machine_that_slows_down_in_between_stalls_nobody_for_longer_than_it_must(slower_at: int):
    machine = Machine(*CPU, seed=5)

    gaps = gaps_beside_a_prompt(machine, 4, 2000, slower_at=slower_at)

    assert gaps[-1] < 3.5


@pytest.mark.parametrize("slower", [1.5, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("costs", [CPU, COMPILED])
def test_a_prompt_gets_on_as_well_after_the_machine_has_slowed_down(costs: tuple[float, ...], slower: float):
    """In steps, of which each is slower by as much; chunks of one token would teach nothing and go on for ever."""
    before = gaps_beside_a_prompt(Machine(*costs, seed=5), 4, 2000)
    after = gaps_beside_a_prompt(Machine(*costs, seed=5), 4, 2000, slower_at=10, slower=slower)

    assert len(after) < 1.3 * len(before)


def test_a_noisy_machine_gets_on_with_its_prompts():
    """Steps that vary by 30 % and lag now and then: no promise can hold, but the prompt must not wait for quiet."""
    machine = Machine(*CPU, noise=0.3, outliers=0.03, seed=6)

    gaps = gaps_beside_a_prompt(machine, 4, 2000)

    assert 1.7 < gaps[len(gaps) // 2] < 3.0
    assert len(gaps) < 500
