"""One pass over the queues: priorities, fairness between models, and batches that spread."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bus.codec.wire import NO_FENCE, QueuedJob, QueueView
from bus.ids import JobId, ModelName, NodeId
from bus.keys import queue_name
from dispatcher.plan import Choice, plan
from dispatcher.rank import Node

NOW = 1_000_000


def head(model: str, prio: int, *names: str, alone: bool = False) -> QueueView:
    jobs = [
        QueuedJob(f"{at + 1}-0", JobId(name), NO_FENCE, "gateway:g", 10, 50, 0, alone) for at, name in enumerate(names)
    ]
    return QueueView(queue_name(model, prio), len(jobs), tuple(jobs))


def nodes(**capacities: int) -> list[Node]:
    return [Node(NodeId(name), capacity) for name, capacity in capacities.items()]


def run(
    heads: list[QueueView], fleet: dict[str, list[Node]], *, turn: int = 0, limit: int = 64, seed: int = 3
) -> list[Choice]:
    return plan(
        heads, {ModelName(model): every for model, every in fleet.items()}, NOW, turn, random.Random(seed).random, limit
    )


def jobs(choices: list[Choice]) -> list[str]:
    return [choice.job.job_id for choice in choices]


def test_redelivered_jobs_of_any_model_go_before_new_ones() -> None:
    heads = [head("a", 1, "new-a"), head("b", 0, "again-b"), head("a", 0, "again-a")]

    chosen = jobs(run(heads, {"a": nodes(x=9), "b": nodes(y=9)}))

    assert set(chosen[:2]) == {"again-a", "again-b"}
    assert chosen[2] == "new-a"


def test_models_take_turns_on_a_shared_node() -> None:
    """A long queue of one model must not take the whole node."""
    shared = nodes(x=4)
    heads = [head("a", 1, *(f"a{i}" for i in range(10))), head("b", 1, *(f"b{i}" for i in range(10)))]

    chosen = jobs(run(heads, {"a": shared, "b": shared}))

    assert chosen == ["a0", "b0", "a1", "b1"]


def test_the_first_turn_moves_on_with_each_pass() -> None:
    heads = [head("a", 1, "a0"), head("b", 1, "b0")]
    fleet = {"a": nodes(x=1), "b": nodes(y=1)}

    assert jobs(run(heads, fleet, turn=0, limit=1)) == ["a0"]
    assert jobs(run(heads, {"a": nodes(x=1), "b": nodes(y=1)}, turn=1, limit=1)) == ["b0"]


def test_a_batch_fills_the_fleet_evenly_and_stops_at_its_capacity() -> None:
    fleet = nodes(x=3, y=3)

    choices = run([head("a", 1, *(f"j{i}" for i in range(20)))], {"a": fleet})

    assert Counter(choice.scores[0].node for choice in choices) == {"x": 3, "y": 3}


def test_a_job_that_must_wait_does_not_hold_up_those_behind_it() -> None:
    """The poison job waits for an empty node; its neighbours are served meanwhile."""
    busy = Node(NodeId("x"), 4, running=1)
    other = Node(NodeId("y"), 4, running=1)
    heads = [head("a", 0, "poison", alone=True), head("a", 1, "good1", "good2")]

    choices = run(heads, {"a": [busy, other]})

    assert jobs(choices)[0] == "poison"  # assign marks the node it names, and leaves the job queued
    kept = choices[0].scores[0].node
    assert {choice.scores[0].node for choice in choices[1:]} == {"x", "y"} - {kept}


def test_a_job_without_any_node_is_passed_over() -> None:
    assert jobs(run([head("a", 1, "a0"), head("b", 1, "b0")], {"b": nodes(y=1)})) == ["b0"]
    assert run([head("a", 1, "a0")], {}) == []


def test_a_pass_takes_at_most_what_one_assign_call_takes() -> None:
    assert len(run([head("a", 1, *(f"j{i}" for i in range(200)))], {"a": nodes(x=500)})) == 64


def test_a_large_fleet_is_compared_by_its_least_loaded_nodes() -> None:
    fleet = [Node(NodeId(f"n{i}"), 8, running=1, promised_new=100 * (i + 1)) for i in range(300)]

    choices = run([head("a", 1, "j")], {"a": fleet})

    assert choices[0].scores[0].node == "n0"
    assert choices[0].scores[0].candidates == 64


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(0, 6)),
        max_size=4,
        unique_by=lambda one: one[:2],
    ),
    st.dictionaries(st.sampled_from("wxyz"), st.integers(0, 4), max_size=4),
    st.integers(0, 5),
    st.integers(1, 10),
)
def test_no_plan_exceeds_capacity_or_offers_a_job_twice(
    queues: list[tuple[str, int, int]], capacities: dict[str, int], turn: int, limit: int
) -> None:
    fleet = nodes(**capacities)
    heads = [head(model, prio, *(f"{model}{prio}-{i}" for i in range(count))) for model, prio, count in queues if count]

    choices = run(heads, {"a": fleet, "b": fleet}, turn=turn, limit=limit)

    assert len(choices) <= limit
    assert len(set(jobs(choices))) == len(choices)
    per_node = Counter(choice.scores[0].node for choice in choices)
    assert all(count <= capacities[node] for node, count in per_node.items())
    room = sum(capacities.values())
    assert len(choices) == min(limit, room, sum(count for _, _, count in queues))
