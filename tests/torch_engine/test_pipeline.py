"""Steps in flight: the next one is launched before the host knows what the last one drew, and nobody notices."""

from pathlib import Path

import pytest

from bus.jobs import Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.plan import Work
from gpu_worker.torch_engine.prompt import Answer, prepare
from gpu_worker.torch_engine.runner import late_rows
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence, State
from tests.torch_engine.slot_model import slot_engine
from tests.torch_engine.tiny import GREEDY, Outcome, deliver, request, run, tiny_engine


def ahead(engine: Assembled) -> Assembled:
    engine.core.runner.depth = 1
    return engine


def begin(engine: Assembled, wanted: GenerateRequest, outcomes: dict[str, Outcome]) -> None:
    outcomes[wanted.sequence] = Outcome(wanted)
    answer = prepare(wanted, engine.text, context_max=engine.context)
    assert isinstance(answer, Answer)
    deliver(engine.core.add(answer), outcomes)


COUNTING = Sampling(temperature=0.7, frequency_penalty=0.5, repetition_penalty=1.2)  # looks at the late token too


@pytest.mark.parametrize(("capacity", "sampling"), [(1, GREEDY), (3, COUNTING), (8, GREEDY)])
def test_the_pieces_of_every_sequence_are_the_same(model_dir: Path, capacity: int, sampling: Sampling) -> None:
    texts = [f"{n} the river and the mill " * (1 + n % 4) for n in range(9)]
    wanted = [request(str(n), text, seed=n, sampling=sampling, logprobs=2) for n, text in enumerate(texts)]

    at_once = run(tiny_engine(model_dir, capacity=capacity), wanted)
    one_ahead = run(ahead(tiny_engine(model_dir, capacity=capacity)), wanted)

    assert {n: o.pieces for n, o in one_ahead.items()} == {n: o.pieces for n, o in at_once.items()}


def test_a_step_is_launched_before_the_last_one_is_read(model_dir: Path) -> None:
    engine = ahead(tiny_engine(model_dir))
    outcomes: dict[str, Outcome] = {}
    begin(engine, request("a", "hello", max_tokens=3), outcomes)

    counts = []
    while not engine.core.idle:
        deliver(engine.core.step().pieces, outcomes)
        counts.append(len(outcomes["a"].tokens))

    assert counts == [0, 1, 2, 3]


def test_no_row_is_computed_behind_the_last_token(model_dir: Path) -> None:
    """Where an answer will end by its length is known ahead; only other ends waste a row."""
    engine = ahead(slot_engine(model_dir))
    outcomes: dict[str, Outcome] = {}
    begin(engine, request("a", "hello", max_tokens=4), outcomes)

    rows = 0
    while not engine.core.idle:
        report = engine.core.step()
        rows += report.decode_rows
        deliver(report.pieces, outcomes)

    assert rows == 3  # the first of four tokens comes from the prompt


def test_blocks_of_a_cancelled_answer_go_back_when_nothing_in_flight_writes_to_them(model_dir: Path) -> None:
    engine = ahead(slot_engine(model_dir))
    outcomes: dict[str, Outcome] = {}
    begin(engine, request("a", "hello", max_tokens=50), outcomes)
    for _ in range(4):
        deliver(engine.core.step().pieces, outcomes)
    pool = engine.core.scheduler.pool

    deliver(engine.core.cancel("a"), outcomes)

    assert outcomes["a"].end is not None
    assert pool.free < pool.total
    assert not engine.core.idle
    assert engine.core.step().pieces == ()
    assert pool.free == pool.total
    assert engine.core.idle


def test_what_is_drawn_for_a_cancelled_answer_reaches_no_other_of_its_name(model_dir: Path) -> None:
    engine = ahead(slot_engine(model_dir))
    outcomes: dict[str, Outcome] = {}
    begin(engine, request("a", "hello", max_tokens=50), outcomes)
    for _ in range(4):
        deliver(engine.core.step().pieces, outcomes)
    deliver(engine.core.cancel("a"), outcomes)

    again = request("a", "hello", max_tokens=9)
    begin(engine, again, outcomes)
    while not engine.core.idle:
        deliver(engine.core.step().pieces, outcomes)

    assert outcomes["a"].tokens == run(slot_engine(model_dir), [again])["a"].tokens


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    """What is in flight may be somebody's last token, and it writes to blocks that would have another owner."""
    one = Scheduler(BlockPool(4, 4, prefix_cache=False), capacity=2, chunk_max=16)
    old, young = sequence("old", 7), sequence("young", 4)
    one.add(old)
    one.add(young)
    before: tuple[Work, ...] = ()
    while (plan := one.plan()).work:
        one.launched(plan)
        read(one, before)
        before = plan.work

    assert before, "the plan is empty only because a step is in flight"
    assert one.preemptions == 0
    read(one, before)
    assert one.plan().work
    assert one.preemptions == 1
    assert (old.state, young.state) == (State.RUNNING, State.WAITING)


def sequence(name: str, prompt: int) -> Sequence:
    return Sequence(name, [1] * prompt, prompt, 0, 16, SamplingChoice(0.0, 1.0, 0, 0))


def read(one: Scheduler, works: tuple[Work, ...]) -> None:
    for work in works:
        if work.samples:
            work.sequence.tokens.append(5)
        one.collected(work, valid=work.count)


def test_answers_that_are_guessed_are_read_at_once_and_others_stay_ahead(model_dir: Path) -> None:
    """A guess needs the last token on the host; who guesses badly pauses, and steps are launched ahead meanwhile."""
    wanted = [request("a", "hello", max_tokens=60)]
    at_once, one_ahead = slot_engine(model_dir, speculate=8), slot_engine(model_dir, speculate=8, depth=1)

    run(at_once, wanted)
    run(one_ahead, wanted)

    assert one_ahead.core.accepted > at_once.core.accepted / 2 > 5  # after a pause one step is in flight still

    engine = slot_engine(model_dir, speculate=8, depth=1)
    outcomes: dict[str, Outcome] = {}
    begin(engine, wanted[0], outcomes)
    in_flight = []
    while not engine.core.idle:
        deliver(engine.core.step().pieces, outcomes)
        in_flight.append(sum(one.in_flight for one in engine.core.scheduler.running))
    assert 0 in in_flight
    assert 1 in in_flight


def test_a_late_row_takes_the_last_draw_of_its_sequence() -> None:
    a, b, c = sequence("a", 4), sequence("b", 4), sequence("c", 4)
    before = (Work(a, 3, (1,), sampled=1), Work(c, 0, (1, 1), sampled=0), Work(b, 3, (1,), sampled=1))
    now = (
        Work(b, 4, (0,), sampled=1, late=True),
        Work(c, 2, (1, 1), sampled=1),
        Work(a, 4, (0,), sampled=1, late=True),
    )

    assert late_rows(now, before) == ([0, 3], [1, 0])
