"""The choice of a node: tokens over measured speed, failures, and the rules that keep a node out of the choice."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from bus.codec.wire import NO_FENCE, QueuedJob
from bus.ids import JobId, NodeId
from dispatcher.rank import Node, promise, rank, score

NOW = 1_000_000


def node(name: str, **fields: object) -> Node:
    return Node(NodeId(name), **{"capacity": 8, "prefill_rate": 1_000.0, "decode_rate": 100.0, **fields})  # type: ignore[arg-type]


def job(
    name: str = "c0-j", *, est_prompt: int = 0, est_new: int = 50, avoid: tuple[str, ...] = (), alone: bool = False
) -> QueuedJob:
    return QueuedJob(
        "1-0", JobId(name), NO_FENCE, "gateway:g", est_prompt, est_new, 0, alone, tuple(NodeId(one) for one in avoid)
    )


def order(one: QueuedJob, nodes: list[Node], seed: int = 1) -> list[str]:
    return [ranked.node for ranked in rank(one, nodes, NOW, random.Random(seed).random)]


def test_the_node_with_the_shortest_expected_wait_comes_first() -> None:
    """Load is tokens promised over measured speed, not requests counted."""
    fast_but_busy = node("a", running=6, promised_new=900, decode_rate=100.0)  # 9 s
    slow_but_idle = node("b", running=1, promised_new=300, decode_rate=20.0)  # 15 s

    assert order(job(), [slow_but_idle, fast_but_busy]) == ["a", "b"]


def test_a_long_prompt_goes_where_prefill_is_fast() -> None:
    slow = node("slow", prefill_rate=100.0)
    fast = node("fast", prefill_rate=1_000.0, promised_new=100)  # 1 s of decoding ahead

    assert order(job(est_prompt=10), [slow, fast])[0] == "slow"
    assert order(job(est_prompt=4_000), [slow, fast])[0] == "fast"


def test_promised_prompts_count_as_load_too() -> None:
    prefilling = node("a", running=1, promised_prompt=5_000)
    decoding = node("b", running=1, promised_new=100)

    assert order(job(), [prefilling, decoding]) == ["b", "a"]


def test_a_failing_node_is_charged_what_its_failures_will_cost() -> None:
    """Its load looks low because its jobs come back; without the charge it would eat every job."""
    black_hole = node("a", failure=0.6)
    busy = node("b", promised_new=200)

    assert order(job(), [black_hole, busy]) == ["b", "a"]


def test_a_full_and_a_broken_node_are_not_offered() -> None:
    full = node("a", running=8)
    broken = node("c", broken=True, breaker_until_ms=NOW + 1)
    free = node("d", promised_new=10**6)

    assert order(job(), [full, broken, free]) == ["d"]


def test_a_breaker_that_has_run_out_lets_one_probe_through() -> None:
    probing = node("a", broken=True, breaker_until_ms=NOW - 1, probing=True)
    ready = node("b", broken=True, breaker_until_ms=NOW - 1)

    assert order(job(), [probing, ready]) == ["b"]
    promise(ready, job())
    assert order(job(), [probing, ready]) == []


def test_an_avoided_node_is_passed_over_while_another_lives_even_a_full_one() -> None:
    """A node that failed the job gets it again only when there is no other node of the model."""
    failed_it = node("a")
    full = node("b", running=8)

    assert order(job(avoid=("a",)), [failed_it, full]) == []
    assert order(job(avoid=("a",)), [failed_it]) == ["a"]


def test_a_node_kept_for_another_job_is_not_offered() -> None:
    assert order(job(), [node("a", alone="c0-other"), node("b")]) == ["b"]
    assert order(job(alone=True), [node("a", alone="c0-other"), node("b")]) == ["b"]


def test_a_job_that_crashed_twice_is_offered_an_empty_node_before_any_other() -> None:
    busy = node("a", running=1)
    empty = node("b", running=0, promised_new=10**6)

    assert order(job(alone=True), [busy, empty]) == ["b", "a"]


def test_a_lone_job_returns_to_the_node_that_runs_empty_for_it() -> None:
    emptying = node("a", running=7, alone="c0-j")
    other = node("b", running=1)

    assert order(job("c0-j", alone=True), [other, emptying])[0] == "a"


def test_a_lone_job_waits_for_the_node_that_will_be_done_first_even_if_it_is_full() -> None:
    long = node("a", running=1, promised_new=5_000)
    short = node("b", running=8, promised_new=80)

    assert order(job(alone=True), [long, short]) == ["b", "a"]


def test_a_job_with_progress_goes_on_where_its_token_ids_mean_the_same() -> None:
    """Elsewhere they are dropped and the text is tokenised again: correct, but not the same draw."""
    same = node("a", resume="d1", promised_new=500)
    other = node("b", resume="d2")
    resumed = msgspec.structs.replace(job(), resume="d1")

    assert order(resumed, [same, other]) == ["a"]
    assert order(resumed, [other]) == ["b"]
    assert order(job(), [same, other]) == ["b", "a"]


def test_a_tie_is_broken_at_random_between_the_best_only() -> None:
    twins = [node("a"), node("b"), node("c", promised_new=1_000)]

    firsts = {order(job(), twins, seed)[0] for seed in range(50)}

    assert firsts == {"a", "b"}


def test_a_batch_spreads_over_equal_nodes() -> None:
    """Each pick counts against its node at once, so the rest of the batch goes elsewhere."""
    nodes = [node("a"), node("b"), node("c")]
    draw = random.Random(7).random
    by_id = {one.node: one for one in nodes}

    for index in range(12):
        picked = rank(job(f"c0-{index}"), nodes, NOW, draw)[0]
        promise(by_id[picked.node], job())

    assert [one.running for one in nodes] == [4, 4, 4]


def test_the_score_keeps_its_terms() -> None:
    terms = score(
        node("a", promised_prompt=500, promised_new=100, failure=0.5, running=3), job(est_prompt=250), candidates=2
    )

    assert (terms.wait_ms, terms.prefill_ms, terms.penalty_ms) == (1_500.0, 250.0, 2_000.0)
    assert terms.cost_ms == 3_750.0
    assert (terms.running, terms.candidates) == (3, 2)


def test_a_node_that_has_measured_nothing_gets_its_chance_as_a_modest_gpu() -> None:
    """Ranked by a rate of nought it would never run a job, and so never measure one."""
    unmeasured = node("new", prefill_rate=0.0, decode_rate=0.0)
    idle = node("idle", decode_rate=500.0)
    busy = node("busy", promised_new=200)

    assert set(order(job(), [unmeasured, idle])[:2]) == {"new", "idle"}
    assert order(job(), [busy, unmeasured])[0] == "new"
    loaded = node("new", prefill_rate=0.0, decode_rate=0.0, running=1, promised_new=100)
    assert order(job(), [loaded, busy])[0] == "busy"


nodes_drawn = st.lists(
    st.builds(
        node,
        st.sampled_from("abcdefgh"),
        running=st.integers(0, 9),
        promised_new=st.integers(0, 9_999),
        failure=st.floats(0, 1),
        broken=st.booleans(),
        breaker_until_ms=st.sampled_from([0, NOW - 1, NOW + 1]),
        probing=st.booleans(),
        alone=st.sampled_from(["", "c0-x"]),
    ),
    max_size=8,
    unique_by=lambda one: one.node,
)


@given(nodes_drawn, st.integers())
def test_whatever_the_fleet_the_choice_is_open_has_room_and_is_sorted(nodes: list[Node], seed: int) -> None:
    ranked = rank(job(), nodes, NOW, random.Random(seed).random, at_most=99)

    by_id = {one.node: one for one in nodes}
    for one in ranked:
        chosen = by_id[one.node]
        assert chosen.running < chosen.capacity and not chosen.alone
        assert not chosen.broken or (chosen.breaker_until_ms <= NOW and not chosen.probing)
    costs = [one.cost_ms for one in ranked]
    assert all(later >= costs[0] / 1.02 - 1.1 for later in costs)
