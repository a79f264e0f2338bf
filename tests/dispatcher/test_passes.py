"""Passes one by one, on a real server: when a look is needed, and when the wake said enough."""

import asyncio
import random

import pytest

from bus.cell import Cell
from bus.codec.entries import parse_wake
from bus.codec.wire import NO_FENCE, CellView, FinishPiece, QueuedJob, QueueView
from bus.ids import JobId, ModelName, NodeId
from bus.keys import queue_name
from bus.link import Link
from bus.settings import Settings
from dispatcher.board import FRESH_MS, Board
from dispatcher.passes import Passes
from dispatcher.rank import Node
from dispatcher.sharing import Share
from tests.dispatcher.hands import MODEL, HandNode, submit

QUEUE = queue_name(MODEL, 1)
M = ModelName(MODEL)


class Dispatching:
    """Passes that are told of wakes by hand, in the order of the stream."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.passes = Passes(cell, Share("dispatcher:me"), random.Random(1).random, fresh_ms=60_000)
        self.last_id = "-"

    async def hear(self) -> None:
        """Tell all wakes since the last call, then make passes until nothing moves."""
        for entry_id, flat in await self.cell.link.send("XRANGE", self.cell.keys.wake, self.last_id, "+"):
            self.last_id = f"({entry_id.decode()}"
            wake = parse_wake({name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)})
            if wake.queue:
                self.passes.wake(wake.queue, wake.head)
            else:
                self.passes.wake_room()
        for _ in range(5):
            await self.passes.run_pass()


async def test_a_new_job_is_assigned_without_a_look_while_the_nodes_are_known(cell: Cell) -> None:
    node = await HandNode.join(cell, "a", capacity=8)
    dispatching = Dispatching(cell)
    await submit(cell, "j0")
    await dispatching.hear()
    looks = dispatching.passes.looks

    await submit(cell, "j1", "j2")
    await dispatching.hear()

    assert dispatching.passes.looks == looks
    assert [one.job_id for one in await node.take()] == ["c0-j0", "c0-j1", "c0-j2"]


async def test_when_the_known_nodes_are_full_it_looks_and_finds_the_room_that_appeared(cell: Cell) -> None:
    node = await HandNode.join(cell, "a", capacity=1)
    dispatching = Dispatching(cell)
    for index in range(4):
        await submit(cell, f"j{index}")
        await dispatching.hear()
        (work,) = await node.take()
        await node.finish([work])

    assert dispatching.passes.assigned == 4


async def test_a_new_job_never_overtakes_those_that_wait(cell: Cell) -> None:
    """What waits without room is in the queue; its wake is long gone."""
    node = await HandNode.join(cell, "a", capacity=1)
    dispatching = Dispatching(cell)
    await submit(cell, "j0", "j1")
    await dispatching.hear()
    work = await node.take()
    await node.finish(work)

    await submit(cell, "j2")
    await dispatching.hear()

    assert [one.job_id for one in await node.take()] == ["c0-j1"]


async def test_more_jobs_for_a_full_fleet_cost_no_look(cell: Cell) -> None:
    """A flood that waits must not keep the server busy with looks; room wakes us."""
    node = await HandNode.join(cell, "a", capacity=1)
    dispatching = Dispatching(cell)
    await submit(cell, "j0", "j1")
    await dispatching.hear()
    looks = dispatching.passes.looks

    for index in range(2, 10):
        await submit(cell, f"j{index}")
        await dispatching.hear()
    assert dispatching.passes.looks == looks

    await node.finish(await node.take())
    await dispatching.hear()
    assert [one.job_id for one in await node.take()] == ["c0-j1"]


async def test_a_wake_that_comes_after_its_job_was_found_is_no_news(cell: Cell) -> None:
    await HandNode.join(cell, "a", capacity=8)
    dispatching = Dispatching(cell)
    await submit(cell, "j0")
    dispatching.passes.look_again()
    await dispatching.passes.run_pass()
    looks = dispatching.passes.looks

    await dispatching.hear()

    assert (dispatching.passes.looks, dispatching.passes.assigned) == (looks, 1)


async def test_a_node_that_left_since_the_look_costs_a_look_and_no_job(cell: Cell) -> None:
    gone = await HandNode.join(cell, "a", capacity=8)
    dispatching = Dispatching(cell)
    await submit(cell, "j0")
    await dispatching.hear()
    await cell.drop_lease(gone.holder)
    other = await HandNode.join(cell, "b", capacity=8)

    await submit(cell, "j1")
    await dispatching.hear()

    assert [one.job_id for one in await other.take()] == ["c0-j1"]


async def pass_over(cell: Cell, times: int = 20) -> Passes:
    """A dispatcher that has just started, after some passes."""
    passes = Passes(cell, Share("dispatcher:me"), random.Random(1).random)
    for _ in range(times):
        await passes.run_pass()
    return passes


async def test_a_page_of_jobs_that_avoid_the_free_node_hides_no_job_behind_them(cell: Cell) -> None:
    """70 jobs have failed on `a`, and wait for `b`, which is full; the one behind them may run on `a`."""
    other = await HandNode.join(cell, "b", capacity=1)
    await submit(cell, "busy")
    await pass_over(cell)
    node = await HandNode.join(cell, "a", capacity=100)
    await submit(cell, *(f"j{index}" for index in range(70)))
    await pass_over(cell)
    for one in await node.take():
        await cell.requeue(one.job_id, one.fence, "node_error", "refused")
    await cell.link.send("HSET", cell.keys.node(node.node), "breaker_n", 0, "breaker_until", 0)
    await asyncio.sleep(0.1)
    assert (await cell.sweep("sweeper")).released == 70
    await submit(cell, "innocent")
    await put_at_the_end(cell, JobId("c0-innocent"))

    passes = await pass_over(cell, 1)  # all in one: on a busy fleet the next pass begins at the front again

    assert [one.job_id for one in await node.take()] == ["c0-innocent"]
    assert await other.running() == 1
    assert passes.looks == 2


async def test_jobs_that_are_gone_hold_up_none_behind_them(cell: Cell) -> None:
    """Each was counted against the node in vain: the next look comes at once, not with the next wake."""
    node = await HandNode.join(cell, "a", capacity=2)
    await submit(cell, *(f"gone{index}" for index in range(10)), "last")
    for index in range(10):
        await cell.link.send("DEL", cell.keys.job(JobId(f"c0-gone{index}")))

    await pass_over(cell, 10)

    assert [one.job_id for one in await node.take()] == ["c0-last"]


async def test_a_nodes_hash_full_of_nonsense_costs_only_that_node(cell: Cell) -> None:
    """Anybody may HSET: whoever looks at all nodes reads it as a node without figures."""
    odd = await HandNode.join(cell, "odd")
    node = await HandNode.join(cell, "a")
    figures = ["capacity", "prefill_rate", "failure", "breaker_n", "layers", "layer_count", "epoch", "ok", "state"]
    for number, nonsense in enumerate((b"nan", b"inf", b"-inf", b"x", b"\xff", b"9" * 400)):
        for name in figures:
            await cell.link.send("HSET", cell.keys.node(odd.node), name, nonsense)
        await submit(cell, f"job{number}")

        await pass_over(cell, 3)

        work = await node.take()
        assert len(work) == 1
        await node.finish(work)
        assert {view.node for view in await cell.nodes()} == {"a", "odd"}


async def put_at_the_end(cell: Cell, job_id: JobId) -> None:
    """The only new job waits behind those that were handed back, as if it had been handed back after them."""
    again = queue_name(MODEL, 0)
    await cell.link.send("DEL", cell.keys.queue(QUEUE))
    words: list[str | int] = ["fence", "0.0", "out", "gateway:g1", "est_prompt", 10, "est_new", 16, "deadline", 10**13]
    words += ["alone", "", "avoided", "", "resume", ""]
    entry = await cell.link.send("XADD", cell.keys.queue(again), "*", "job", job_id, *words)
    await cell.link.send("HSET", cell.keys.job(job_id), "place", f"queue {again} {entry.decode()}")


async def break_and_wait(cell: Cell, node: HandNode) -> None:
    """One failure of the node opens its breaker, which is half open a moment later."""
    await submit(cell, "first")
    await pass_over(cell)
    (work,) = await node.take()
    await cell.requeue(work.job_id, work.fence, "node_error", "CUDA error")
    await cell.cancel(work.job_id, "test")
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("ending", ["client error", "cancelled", "node error"])
async def test_a_node_whose_probe_did_not_succeed_is_offered_another(
    link: Link, settings: Settings, ending: str
) -> None:
    """A probe that ends without a verdict, or badly, must not be the node's last job for ever."""
    cell = Cell(link, 0, settings.changed(breaker_ms=50, breaker_max_ms=60))
    node = await HandNode.join(cell, "a")
    await break_and_wait(cell, node)
    await submit(cell, "probe")
    await pass_over(cell)
    (probe,) = await node.take()
    match ending:
        case "client error":
            piece = FinishPiece(
                *(probe.job_id, probe.fence, probe.route, 0, b"", "error", 0, 0, "bad_request", "no", "client")
            )
            await cell.finish(node.holder, node.node, [piece])
        case "cancelled":
            await cell.cancel(probe.job_id, "test")
            piece = FinishPiece(probe.job_id, probe.fence, probe.route, 0, b"", "cancelled")
            await cell.finish(node.holder, node.node, [piece])
        case _:
            await cell.requeue(probe.job_id, probe.fence, "node_error", "CUDA error")
            await cell.cancel(probe.job_id, "test")
    await asyncio.sleep(0.1)

    await submit(cell, "second")
    await pass_over(cell)

    assert [one.job_id for one in await node.take()] == ["c0-second"]


def view(*entry_ids: str, now_ms: int = 5_000) -> CellView:
    heads = [QueuedJob(one, JobId(f"c0-{one}"), NO_FENCE, "gateway:g", 1, 1, 0) for one in entry_ids]
    return CellView(now_ms, (QueueView(QUEUE, len(heads), tuple(heads)),), {})


def test_a_board_knows_nodes_for_a_moment_only() -> None:
    board = Board()
    board.remember(view(), {M: [Node(NodeId("a"), 1)]}, clock_ms=100.0)

    assert board.nodes_for([M], clock_ms=100.0 + FRESH_MS - 1) is not None
    assert board.nodes_for([M], clock_ms=100.0 + FRESH_MS) is None
    assert board.nodes_for([M, ModelName("other")], clock_ms=101.0) is None


def test_a_board_of_full_nodes_asks_for_a_look() -> None:
    board = Board()
    board.remember(view(), {M: [Node(NodeId("a"), 1, running=1)]}, clock_ms=100.0)

    assert board.nodes_for([M], clock_ms=101.0) is None


def test_a_board_keeps_the_servers_clock() -> None:
    board = Board()
    board.remember(view(now_ms=5_000), {}, clock_ms=100.0)

    assert board.now_ms(clock_ms=150.0) == 5_050


def test_entries_up_to_the_last_one_of_a_look_are_no_news() -> None:
    board = Board()
    board.remember(view("5-1", "5-9"), {}, clock_ms=0.0)
    (late, new) = view("5-9", "5-10").queues[0].heads

    assert not board.is_news(QUEUE, late)
    assert board.is_news(QUEUE, new)
