"""What the next step computes. Plain values in, plans out: no tensor is needed to test any of it."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.plan import Plan
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence, State
from gpu_worker.torch_engine.speculation import Guesser

BLOCK = 4


def scheduler(blocks: int = 32, *, capacity: int = 4, chunk_max: int = 16, prefix_cache: bool = True) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK, prefix_cache=prefix_cache), capacity=capacity, chunk_max=chunk_max)


def sequence(name: str, prompt: list[int] | int, *, new: int = 5, total_max: int = 10_000) -> Sequence:
    tokens = list(range(1000, 1000 + prompt)) if isinstance(prompt, int) else list(prompt)
    total = min(total_max, len(tokens) + new)
    return Sequence(name, tokens, len(tokens), 0, total, SamplingChoice(0.0, 1.0, 0, 0))


def perform(one: Scheduler, plan: Plan) -> None:
    """What the core does, with a next token that depends on all tokens before it, like a model's."""
    one.launched(plan)
    for work in plan.work:
        if work.samples:
            work.sequence.tokens.append(hash(tuple(work.sequence.tokens)) % 997)
        one.collected(work, valid=work.count - len(work.drafts))
        if work.samples and len(work.sequence.tokens) >= work.sequence.total_max:
            one.remove(work.sequence)


def run(one: Scheduler, limit: int = 2000) -> int:
    steps = 0
    while not one.idle:
        plan = one.plan()
        assert plan.work, "something waits, but nothing is planned"
        perform(one, plan)
        one.check_integrity()
        steps += 1
        assert steps < limit, "no progress"
    return steps


def names(plan: Plan) -> tuple[list[str], list[tuple[str, int]]]:
    return [w.sequence.id for w in plan.decode], [(w.sequence.id, w.count) for w in plan.prefill]


def test_a_long_prompt_goes_in_chunks_beside_running_answers() -> None:
    one = scheduler(64, chunk_max=16)
    one.add(sequence("short", 8))
    perform(one, one.plan())
    one.add(sequence("long", [1] * 40))

    plans = []
    for _ in range(3):
        plans.append(names(plan := one.plan()))
        perform(one, plan)

    assert plans == [
        (["short"], [("long", 16)]),
        (["short"], [("long", 16)]),
        (["short"], [("long", 8)]),
    ]


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    one = scheduler(chunk_max=16)
    one.add(sequence("a", 20))

    first = one.plan()
    assert [w.samples for w in first.work] == [False]
    perform(one, first)
    assert [w.samples for w in one.plan().work] == [True]


def test_no_more_sequences_run_than_there_are_slots() -> None:
    one = scheduler(capacity=2)
    for name in "abc":
        one.add(sequence(name, [ord(name)] * 4))

    assert len(one.plan().work) == 2


def test_sequences_are_admitted_in_the_order_of_their_arrival() -> None:
    """A short prompt does not pass a long one that lacks blocks, or the long one might wait for ever."""
    one = scheduler(blocks=8, chunk_max=64)
    one.add(sequence("first", [1] * 20, new=2))
    one.add(sequence("long", [2] * 30, new=2))
    one.add(sequence("short", [3] * 2, new=2))

    assert names(one.plan())[1] == [("first", 20)]


def test_the_youngest_makes_room_for_the_oldest() -> None:
    one = scheduler(blocks=4, capacity=2, prefix_cache=False)
    old, young = sequence("old", [1] * 7, new=6), sequence("young", [2] * 4, new=6)
    one.add(old)
    one.add(young)
    while not one.preemptions:
        perform(one, one.plan())

    assert old.state is State.RUNNING
    assert (young.state, young.cached_len, young.blocks) == (State.WAITING, 0, [])


def test_a_second_prompt_with_the_same_beginning_computes_only_its_own_end() -> None:
    one = scheduler(chunk_max=64)
    shared = list(range(100, 113))  # three full blocks and one token
    one.add(sequence("first", shared))
    perform(one, one.plan())
    second = sequence("second", [*shared[:12], 7, 8])
    one.add(second)

    plan = one.plan()

    assert [(w.sequence.id, w.start, w.count) for w in plan.prefill] == [("second", 12, 2)]
    assert second.blocks[:3] == one.running[0].blocks[:3]


def test_a_prompt_that_is_known_whole_still_computes_its_last_token() -> None:
    """The logits of the last token are what the next one is sampled from."""
    one = scheduler(chunk_max=64)
    one.add(sequence("first", 12))
    perform(one, one.plan())
    one.add(sequence("again", 12))

    assert [(w.start, w.count) for w in one.plan().prefill] == [(8, 4)]


def test_a_removed_sequence_gives_its_blocks_back_at_once() -> None:
    one = scheduler(blocks=8)
    running, waiting = sequence("a", 16), sequence("b", 30)
    one.add(running)
    one.add(waiting)
    perform(one, one.plan())

    one.remove(running)
    one.remove(waiting)

    assert one.idle
    assert one.pool.free == 8
    one.check_integrity()


@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    new=st.integers(1, 30),
    blocks=st.integers(8, 40),
    capacity=st.integers(1, 5),
    chunk_max=st.integers(1, 50),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_every_sequence_ends_with_the_same_tokens_as_alone(
    prompts: list[int], new: int, blocks: int, capacity: int, chunk_max: int, prefix_cache: bool, seed: int
) -> None:
    """However few the blocks: preemption may cost time, never a token."""
    chance = random.Random(seed)
    texts = [[chance.randrange(3) for _ in range(min(length, blocks * BLOCK - 1))] for length in prompts]

    def make() -> list[Sequence]:
        return [sequence(str(n), text, new=new, total_max=blocks * BLOCK) for n, text in enumerate(texts)]

    alone = make()
    for each in alone:
        lonely = scheduler(blocks, capacity=1, chunk_max=1000, prefix_cache=False)
        lonely.add(each)
        run(lonely)

    together = make()
    one = scheduler(blocks, capacity=capacity, chunk_max=chunk_max, prefix_cache=prefix_cache)
    for each in together:
        one.add(each)
        perform(one, one.plan())
        assert len(one.running) <= capacity
    run(one, limit=20_000)

    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert one.pool.free == blocks


@given(st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_step_never_takes_more_prompt_tokens_than_its_budget(chunk_max: int, prompts: list[int]) -> None:
    one = scheduler(blocks=200, capacity=6, chunk_max=chunk_max)
    for number, length in enumerate(prompts):
        one.add(sequence(str(number), [number] * length, new=3))
    while not one.idle:
        plan = one.plan()
        decoding = sum(1 for s in one.running if s.pending == 1 and s.answer_len > 0)
        assert sum(w.count for w in plan.prefill) <= chunk_max
        assert len(plan.decode) >= decoding, "a running answer was left out"
        perform(one, plan)


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one() -> None:
    """Half of the budget is for it until it is done; the long one goes on with the other half."""
    one = scheduler(blocks=600, chunk_max=100)
    one.add(sequence("long", [1] * 2000))
    perform(one, one.plan())
    one.add(sequence("short", [2] * 120))

    plans = []
    for _ in range(4):
        plans.append(names(plan := one.plan()))
        perform(one, plan)

    assert [plan[1] for plan in plans] == [
        [("short", 50), ("long", 50)],
        [("short", 50), ("long", 50)],
        [("short", 20), ("long", 80)],
        [("long", 100)],
    ]


def test_prompts_of_about_the_same_length_come_one_after_the_other() -> None:
    """Side by side all of them would be late; and the second may begin like the first, whose blocks it then reuses."""
    one = scheduler(blocks=600, chunk_max=100)
    for name in "abc":
        one.add(sequence(name, [ord(name)] * 150))

    first = one.plan()
    perform(one, first)
    second = one.plan()

    assert names(first)[1] == [("a", 100)]
    assert names(second)[1] == [("a", 50), ("b", 50)]


def test_whoever_passes_leaves_a_slot_and_blocks_to_those_before() -> None:
    def passing(*, blocks: int, capacity: int) -> list[str]:
        one = scheduler(blocks=blocks, capacity=capacity, chunk_max=20)
        for name, length in (("head", 200), ("next", 150), ("short", 12)):
            one.add(sequence(name, [ord(name[0])] * length))
        return [name for name, _ in names(one.plan())[1]]

    assert passing(blocks=100, capacity=3) == ["short", "head"]
    assert passing(blocks=100, capacity=2) == ["head"], "the second slot is for the next"
    assert passing(blocks=50 + 38, capacity=3) == ["head"], "the blocks that are left are for the next"


def test_a_long_prompt_ends_however_many_short_ones_arrive() -> None:
    one = scheduler(blocks=600, capacity=4, chunk_max=20)
    long = sequence("long", [1] * 400, new=1)
    one.add(long)
    for step in range(40):
        one.add(sequence(f"short {step}", [2 + step] * 20, new=1))
        perform(one, one.plan())

    assert long.state is State.FINISHED


def test_a_preempted_sequence_comes_back_before_anybody_new() -> None:
    """So it is younger only than those who were there before it, and they end: it is not preempted for ever."""
    one = scheduler(blocks=12, capacity=3, prefix_cache=False)
    for name in "abc":
        one.add(sequence(name, [ord(name)] * 12, new=20, total_max=48))
    ended: list[str] = []
    for step in range(400):
        if step % 2:
            one.add(sequence(f"new {step}", [step] * 8, new=4))
        perform(one, one.plan())
        ended += [name for name in "abc" if name not in ended and name not in present(one)]
        if len(ended) == 3:
            break

    assert ended == ["a", "b", "c"]
    assert one.preemptions > 0
    assert one.preemptions < 10, "blocks are given before there is room for what they are for"


def present(one: Scheduler) -> set[str]:
    return {each.id for each in [*one.running, *one.waiting]}


class Parrot(Guesser):
    def guess(self, tokens: Any, answer_len: int, room: int) -> tuple[int, ...]:
        return (7,) * max(0, min(room, 8))


@given(st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 20))
@settings(deadline=None)
def test_prompts_and_drafts_share_one_budget(budget: int, prompts: list[int], new: int) -> None:
    one = scheduler(blocks=60, capacity=6, chunk_max=budget)
    for number, length in enumerate(prompts):
        each = sequence(str(number), [number] * length, new=new)
        each.guesser = Parrot(8)
        one.add(each)
    while not one.idle:
        plan = one.plan()
        assert sum(w.count for w in plan.prefill) + sum(len(w.drafts) for w in plan.decode) <= budget
        for work in plan.decode:
            after = work.start + work.count
            assert after <= len(work.sequence.blocks) * BLOCK, "a draft without a place"
            assert after < work.sequence.total_max, "a guess of a token that will not be asked for"
        perform(one, plan)
        one.check_integrity()


def test_few_blocks_cost_little_in_vain() -> None:
    """30 answers of about 50 tokens where blocks for two are, no prefix cache: what preemption computes again.

    Without a reserve at admission it is 0.73 of what is of use; one that is preempted often waits for more of it.
    """
    computed = useful = 0
    for seed in range(20):
        chance = random.Random(seed)
        one = scheduler(blocks=24, capacity=6, chunk_max=64, prefix_cache=False)
        everyone = [sequence(str(n), [n] * chance.randrange(4, 20), new=chance.randrange(10, 60)) for n in range(30)]
        for each in everyone:
            one.add(each)
        while not one.idle:
            plan = one.plan()
            computed += plan.tokens
            perform(one, plan)
        useful += sum(len(each.tokens) - 1 for each in everyone)

    assert computed / useful < 1.6
