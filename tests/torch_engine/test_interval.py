"""An answer's own interval: measured again and again while prompts come in, not concluded from longer steps."""

import pytest

from gpu_worker.torch_engine.interval import EVERY, OwnInterval
from gpu_worker.torch_engine.rates import Rates
from gpu_worker.torch_engine.step_time import Load, Piece, StepTime, load_of
from tests.torch_engine.machine import CPU, Machine, budget, warmed_up

ANSWERS: list[Piece] = [(200, 1)] * 4
ALONE = load_of(ANSWERS)
MIXED = load_of(ANSWERS, [(600, 20)])


def learned(seconds: dict[Load, float]) -> StepTime:
    known = StepTime()
    for _ in range(50):
        for load, took in seconds.items():
            known.observe(load, took)
    return known


def test_what_was_measured_counts_and_not_what_was_expected():
    known = learned({ALONE: 0.03, MIXED: 0.08})
    interval = OwnInterval(known)
    assert interval.seconds(ALONE) == pytest.approx(0.03, rel=0.05)

    for took in (0.02, 0.5, 0.02):  # one of them late
        interval.observe(ALONE, took)

    assert interval.seconds(ALONE) == pytest.approx(0.02, rel=0.05)
    assert interval.seconds(load_of(ANSWERS[:2])) < 0.02


@pytest.mark.parametrize("speed", [0.25, 4.0])
def test_a_machine_of_another_speed_is_measured_again_at_once(speed: float):
    rates = warmed_up(Machine(*CPU, seed=1))
    for _ in range(20):
        rates.observe(decode=ANSWERS, prefill=[(0, 20)], seconds=0.08)
        rates.observe(decode=ANSWERS, prefill=[], seconds=0.03)
    changed = rates.step_time.changes

    budgets: list[int] = []
    while not budgets or budgets[-1]:
        budgets.append(budget(rates, ANSWERS, [(0, 2000)]))
        took_s = (0.03 + 0.0025 * budgets[-1]) / speed
        rates.observe(decode=ANSWERS, prefill=[(0, budgets[-1])] if budgets[-1] else [], seconds=took_s)

    assert rates.step_time.changes > changed
    assert len(budgets) < EVERY / 2


def test_beside_a_long_prompt_answers_are_measured_now_and_then():
    rates = warmed_up(Machine(*CPU, seed=1))
    budgets: list[int] = []
    for _ in range(3 * (EVERY + 1)):
        tokens = budget(rates, ANSWERS, [(0, 2000)])
        rates.observe(decode=ANSWERS, prefill=[(0, tokens)] if tokens else [], seconds=0.03 + 0.0025 * tokens)
        budgets.append(tokens)

    alone = [step for step, tokens in enumerate(budgets) if not tokens]
    assert alone == [EVERY, 2 * EVERY + 1, 3 * EVERY + 2]


def test_nothing_is_measured_where_nothing_was_promised():
    """More wait for their first token than for their next; or nobody answers."""
    rates = Rates()
    for _ in range(3 * EVERY):
        rates.observe(decode=ANSWERS, prefill=[(0, 20)], seconds=0.08)
        assert budget(rates, ANSWERS, [(0, 400)] * 9) > 0
        assert budget(rates, [], [(0, 400)]) > 0
