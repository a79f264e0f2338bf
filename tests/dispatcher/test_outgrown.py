"""Nodes of one model with unequal contexts: jobs go where they seem to fit, and on to where more is said."""

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from bus.cell import Cell
from bus.codec.entries import Assignment
from bus.codec.wire import (
    Assigned,
    Ended,
    FlushPiece,
    NodeView,
    NotYours,
    Pick,
    QueueView,
    Requeued,
    new_nonce,
    pack_tokens,
)
from bus.ids import Fence, JobId, ModelName, NodeId
from bus.link import Link
from bus.settings import Settings
from dispatcher.hopes import Hopes
from dispatcher.passes import Passes
from dispatcher.plan import ASSIGN_MAX, SHORTLIST, plan, rounded_up, unserved
from dispatcher.rank import Node
from dispatcher.sharing import Share
from dispatcher.views import to_nodes
from tests.conftest import wait_until
from tests.dispatcher.conftest import Dispatching
from tests.dispatcher.hands import MODEL, HandNode, submit
from tests.dispatcher.test_capabilities import QUEUE, seen, view
from tests.dispatcher.test_rank import job, node, order

SMALL, BIG = 256, 8192


def test_a_job_that_seems_too_long_goes_to_a_larger_context_even_a_busier_one() -> None:
    nodes = [node("small", context=SMALL), node("big", context=BIG, promised_new=10)]

    assert order(job(est_prompt=100, est_new=50), nodes)[0] == "small"
    assert order(job(est_prompt=100, est_new=200), nodes)[0] == "big"
    assert order(job(est_prompt=300, est_new=10), nodes)[0] == "big"


def test_a_node_that_does_not_say_its_context_is_taken_as_large_enough() -> None:
    assert order(job(est_prompt=300), [node("small", context=SMALL), node("unsaid", promised_new=10)])[0] == "unsaid"


def test_an_answer_may_seem_too_long_where_going_on_elsewhere_costs_less_than_waiting() -> None:
    """Clients ask for far more tokens than they get: nodes must not stand idle for that."""
    nodes = [node("small", context=SMALL), node("big", context=BIG, promised_new=500)]

    assert order(job(est_prompt=100, est_new=4_000), nodes)[0] == "small"
    assert order(job(est_prompt=300, est_new=4_000), nodes)[0] == "big", "a prompt that does not fit gains nothing"


@pytest.mark.parametrize("context", [2_048, 4_096, 0])
@pytest.mark.parametrize(("est_prompt", "est_new"), [(5_000, 100), (4_000, 5_000)])
def test_jobs_that_seem_too_long_for_every_context_are_spread_by_load(
    context: int, est_prompt: int, est_new: int
) -> None:
    """Estimates err: where no other node is larger, they tell nothing about which one to take."""
    nodes = [node("idle", context=context), node("busy", context=context, running=7, promised_new=50)]

    assert {order(job(est_prompt=est_prompt, est_new=est_new), nodes, seed)[0] for seed in range(20)} == {"idle"}


def test_where_no_context_is_large_enough_the_largest_is_taken_even_a_busier_one() -> None:
    nodes = [node("small", context=2_048), node("big", context=4_096, promised_new=100)]

    assert order(job(est_prompt=1_000, est_new=4_096), nodes)[0] == "big"
    assert order(job(est_prompt=9_000, est_new=10), nodes)[0] == "big"


def test_contexts_that_differ_a_little_count_as_equal_where_none_is_large_enough() -> None:
    """Equal machines have unequal memory left; one of them must not get all long jobs for that."""
    nodes = [node("a", context=4_000), node("b", context=4_096, promised_new=50)]

    assert order(job(est_prompt=9_000), nodes)[0] == "a"
    assert order(job(est_prompt=1_000, est_new=9_000), nodes)[0] == "a"
    assert order(job(est_prompt=4_050, est_new=9_000), nodes)[0] == "b", "the only one that holds the prompt"


def test_an_estimate_refuses_nothing() -> None:
    full = node("big", context=BIG, running=8)

    assert order(job(est_prompt=300), [node("small", context=SMALL), full]) == ["small"]


def test_a_job_with_no_larger_context_left_goes_to_the_largest_there_is() -> None:
    """It ends there; the nodes that refused it are none to avoid any more."""
    nodes = {ModelName("m"): [node("small", context=SMALL), node("big", context=BIG, promised_new=900)]}
    given_back = replace(job(), outgrown=0)

    (choice,) = plan([QueueView(QUEUE, 1, (given_back,))], nodes, 1, 0, random.Random(1).random)

    assert [score.node for score in choice.scores] == ["big", "small"]


def test_a_job_that_outgrew_a_node_goes_to_the_largest_context_and_to_none_that_is_as_small() -> None:
    nodes = [
        node("small", context=SMALL),
        node("twin", context=SMALL),
        node("middle", context=512),
        node("unsaid"),
        node("big", context=BIG, promised_new=900),
    ]
    outgrown = replace(job(est_prompt=10, avoid=("small",)), refused=(NodeId("small"),), outgrown=SMALL)

    assert order(outgrown, nodes) == ["big", "middle", "unsaid"]
    assert order(replace(outgrown, begun=True), nodes) == ["big", "middle"], "an answer that has begun"
    assert order(replace(outgrown, outgrown=0, refused=(NodeId("unsaid"),)), nodes)[0] == "big"
    assert order(outgrown, nodes[:2]) == []
    assert order(replace(outgrown, alone=True), nodes[:3]) == ["middle"]


def chosen(jobs: int, nodes: list[Node], est_prompt: int, est_new: int = 50) -> list[str]:
    waiting = tuple(job(f"c0-{index}", est_prompt=est_prompt, est_new=est_new) for index in range(jobs))
    queues = [QueueView(QUEUE, jobs, waiting)]
    return [one.scores[0].node for one in plan(queues, {ModelName(MODEL): nodes}, 1, 0, random.Random(1).random)]


def test_the_few_large_contexts_of_a_large_fleet_are_found_until_they_are_full() -> None:
    """They are more loaded than the 64 nodes that are compared."""
    small = [node(f"small{at}", context=SMALL, capacity=1) for at in range(2 * SHORTLIST)]
    big = [node(f"big{at}", context=BIG, capacity=2, promised_new=100) for at in range(2)]

    assert set(chosen(4, [*small, *big], 100)) <= {one.node for one in small}
    taken = chosen(6, [*small, *big], 300)

    assert sorted(taken[:4]) == ["big0", "big0", "big1", "big1"]
    assert all(name.startswith("small") for name in taken[4:])


def test_a_large_fleet_finds_the_nodes_that_hold_the_prompt_where_few_or_none_hold_the_answer_too() -> None:
    def taken(jobs: int, *more: Node) -> list[str]:
        small = [node(f"small{at}", context=SMALL) for at in range(SHORTLIST)]
        middle = [node(f"middle{at}", context=4_096, promised_new=100) for at in range(4)]
        return sorted(chosen(jobs, [*small, *middle, *more], 300, 5_000))

    every = ["middle0", "middle1", "middle2", "middle3"]
    assert taken(4) == every
    assert taken(5, node("big", context=BIG, promised_new=100)) == ["big", *every], "its queue would cost more"


def test_of_a_large_fleet_of_equal_contexts_no_others_are_looked_at() -> None:
    nodes = [node(f"n{at}", context=4_096, promised_new=at) for at in range(300)]
    queues = [QueueView(QUEUE, 1, (job(est_prompt=300, est_new=5_000),))]

    (choice,) = plan(queues, {ModelName(MODEL): nodes}, 1, 0, random.Random(1).random)

    assert (choice.scores[0].candidates, choice.scores[0].outgrow_ms) == (SHORTLIST, 0.0)


def test_a_pass_looks_for_long_contexts_once_for_jobs_of_like_length() -> None:
    """Else a few long jobs would hold up the dispatcher's loop for as long as the fleet is large."""
    looked = 0

    class Counted(int):
        def __ge__(self, other: int) -> bool:
            nonlocal looked
            looked += 1
            return int.__ge__(self, other)

    fleet = [node(f"n{at}", context=Counted(BIG if at % 7 else SMALL), promised_new=at) for at in range(300)]
    fleet[:SHORTLIST] = [node(f"s{at}", context=SMALL) for at in range(SHORTLIST)]

    assert all(name.startswith("n") for name in chosen(64, fleet, 300))
    assert looked <= len(fleet) + 64 * (SHORTLIST + 10), "all once, and a few for each job"


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (7, 7), (9, 10), (300, 320), (5000, 5120), (8192, 8192)])
def test_lengths_are_rounded_up_by_at_most_a_quarter(tokens: int, size: int) -> None:
    assert rounded_up(tokens) == size


def test_jobs_for_which_no_larger_context_lives_are_asked_about() -> None:
    outgrown = replace(job("j", avoid=("small",)), refused=(NodeId("small"),), outgrown=SMALL)

    def waits_in_vain(*nodes: NodeView) -> bool:
        shown = view(outgrown, *nodes)
        return bool(unserved(shown.queues, shown, to_nodes(shown)))

    small, big = seen("small", context_length=SMALL), seen("big", context_length=BIG)
    assert waits_in_vain(small)
    assert waits_in_vain(small, seen("twin", context_length=SMALL))
    assert waits_in_vain(small, replace(big, alive=False))
    assert not waits_in_vain(small, replace(big, running=4)), "a full one will have room"
    assert not waits_in_vain(replace(small, alive=False)), "without any node it waits like all others"


async def test_a_job_that_outgrows_its_node_reaches_the_larger_one(cell: Cell, dispatching: Dispatching) -> None:
    small = await HandNode.join(cell, "small", context_length=SMALL)
    async with dispatching():
        await submit(cell, "seems_short", est_prompt=10, est_new=5)
        await wait_until(small.running)
        (one,) = await small.take()
        big = await HandNode.join(cell, "big", context_length=BIG)

        await cell.outgrow(one.job_id, one.fence, SMALL)
        await submit(cell, "seems_long", est_prompt=300)

        await wait_until_running(big, 2)

    assert {one.job_id for one in await big.take()} == {"c0-seems_short", "c0-seems_long"}


async def wait_until_running(node: HandNode, count: int) -> None:
    async def is_running() -> bool:
        return await node.running() == count

    await wait_until(is_running)


async def give(cell: Cell, node: HandNode) -> list[Assignment]:
    """All waiting jobs, to this node."""
    while shown := [one for one in (await cell.look()).queues if one.heads]:
        for queue in shown:
            picks = [
                Pick(one.entry_id, one.job_id, one.fence, one.out, (node.node,), new_nonce()) for one in queue.heads
            ]
            assert all(isinstance(one, Assigned) for one in await cell.assign(queue.queue, picks))
    return await node.take()


async def test_a_job_that_waits_for_a_larger_context_in_vain_is_given_to_any_node(
    cell: Cell, dispatching: Dispatching
) -> None:
    small = await HandNode.join(cell, "small", context_length=SMALL)
    big = await HandNode.join(cell, "big", context_length=BIG)
    await submit(cell, "j")
    (given,) = await give(cell, small)
    await cell.outgrow(given.job_id, given.fence, SMALL)
    await cell.link.send("ZREM", cell.keys.model(ModelName(MODEL)), big.node)

    async with dispatching():
        await wait_until(small.running)

    assert [one.job_id for one in await small.take()] == [JobId("c0-j")]


class Asked(Cell):
    """Notes whom `end_unserved` is called for."""

    def __init__(self, link: Link, settings: Settings) -> None:
        super().__init__(link, 0, settings)
        self.asked: list[str] = []

    async def end_unserved(self, job_id: JobId, fence: Fence) -> Ended | Requeued | NotYours:
        self.asked.append(job_id)
        return await super().end_unserved(job_id, fence)


async def test_prompts_that_wait_for_a_node_that_is_away_do_not_hide_an_answer_behind_them(
    link: Link, settings: Settings
) -> None:
    """They may wait until their deadline, an answer that has begun only as long as a restart takes."""
    cell = Asked(link, settings)
    waiting = ASSIGN_MAX + 6
    small = await HandNode.join(cell, "small", capacity=100, context_length=SMALL)
    big = await HandNode.join(cell, "big", context_length=BIG)
    await submit(cell, *(f"p{index}" for index in range(waiting)), "answer")
    *prompts, answer = sorted(await give(cell, small), key=lambda one: one.job_id == "c0-answer")
    for one in prompts:
        await cell.outgrow(one.job_id, one.fence, SMALL)
    piece = FlushPiece(answer.job_id, answer.fence, answer.route, 0, b"abc", 0, pack_tokens([1]))
    await cell.flush(small.holder, small.node, [piece])
    await cell.outgrow(answer.job_id, answer.fence, SMALL)
    await cell.link.send("DEL", cell.keys.node_alive(big.node))
    long_ago = (await cell.look()).now_ms - settings.node_ttl_ms - 1_000
    await cell.link.send("ZADD", cell.keys.model(ModelName(MODEL)), long_ago, big.node)
    passes = Passes(cell, Share("dispatcher:me"), random.Random(1).random)

    for _ in range(4):
        passes.look_again()
        await passes.run_pass()

    assert [one.job_id for one in await small.take()] == ["c0-answer"]
    assert Counter(cell.asked) == dict.fromkeys([*(one.job_id for one in prompts), answer.job_id], 1)


def test_what_may_wait_is_asked_about_again_the_later_the_more_there_is_of_it_but_for_answers() -> None:
    hopes = Hopes(a_second=64)
    prompt, answer, last = job("prompt"), replace(job("answer"), begun=True), job("last")

    hopes.add(prompt, 0.0)
    for index in range(63 + 64):
        hopes.add(job(f"more{index}"), 0.0)
    hopes.add(answer, 0.0)
    hopes.add(last, 0.0)

    assert prompt in hopes and answer in hopes and replace(prompt, fence=Fence("2.a")) not in hopes
    hopes.forget(1.0)
    assert prompt not in hopes and answer not in hopes and last in hopes
    hopes.forget(3.0)
    assert last not in hopes
