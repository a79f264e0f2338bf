"""No chunk is shorter than what costs about as much as the shortest."""

import math

from gpu_worker.torch_engine.least_chunk import AGAIN, KEPT, LONGEST, SHORTEST, LeastChunk


def sizes(cost_s: dict[int, float] | None, steps: int, known: LeastChunk | None = None) -> list[int]:
    """The shortest chunks of so many steps, all of which are as short as may be. cost_s: of sizes; None: all alike."""
    known = known or LeastChunk()
    seen = []
    for _ in range(steps):
        seen.append(known.tokens)
        known.observe(known.tokens, cost_s[known.tokens] if cost_s else 0.003)
    return seen


def test_it_doubles_while_longer_ones_cost_the_same():
    seen = sizes(None, 40)

    assert seen[: 3 * KEPT] == [2] * KEPT + [4] * KEPT + [8] * KEPT
    assert seen[-1] == LONGEST


def test_it_stays_where_tokens_begin_to_count():
    cost_s = {2**n: 0.003 + 0.00001 * 2**n for n in range(1, 11)}

    assert sizes(cost_s, 60)[-1] == 64  # 21 % more than the shortest; of the next size 41 %


def test_a_size_that_is_too_long_is_hardly_ever_tried():
    cost_s = {2**n: 0.001 * 2**n for n in range(1, 11)}

    seen = sizes(cost_s, 1000)

    assert set(seen) == {SHORTEST, 2 * SHORTEST}
    assert seen.count(2 * SHORTEST) == math.ceil((1000 - KEPT) / (AGAIN + 1))


def test_a_late_step_holds_it_up_for_a_while_only():
    known = LeastChunk()
    sizes(None, 2 * KEPT, known)
    assert known.tokens == 8

    known.observe(8, 0.1)

    assert known.tokens == 4
    assert sizes(None, AGAIN + 10, known)[-1] > 8


def test_late_steps_at_the_start_do_not_make_it_long_for_good():
    known = LeastChunk()
    for _ in range(KEPT):
        known.observe(SHORTEST, 0.3)
    cost_s = {2**n: 0.0015 * 2**n for n in range(1, 11)}

    seen = sizes(cost_s, 3 * AGAIN, known)

    assert max(seen) > 16
    assert seen[-1] <= 2 * SHORTEST


def test_steps_of_other_sizes_say_nothing():
    known = LeastChunk()
    for tokens in (1, 3, 50, 500) * 20:
        known.observe(tokens, 0.001)

    assert known.tokens == SHORTEST


def test_another_speed_is_measured_anew():
    known = LeastChunk()
    sizes(None, 20, known)
    known.forget()

    assert sizes(None, 40, known)[0] == SHORTEST
    assert known.tokens == LONGEST
