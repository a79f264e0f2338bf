"""Queued jobs reach nodes: on a real server, with nodes driven by hand."""

import asyncio
import json
import random
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from bus.cell import Cell
from bus.codec.wire import Assigned, Pick, Requeued, SweepReport, new_nonce
from bus.ids import JobId, NodeId, rendezvous
from bus.keys import queue_name
from bus.link import Link, ServerAddress
from bus.process.child import ParentLine
from bus.settings import Settings
from dispatcher.service import log_sweep, run
from dispatcher.sharing import HOLDER_PREFIX
from tests.conftest import wait_until
from tests.dispatcher.conftest import Dispatching
from tests.dispatcher.hands import MODEL, HandNode, submit
from tests.harness.servers import ValkeyServer


async def states(cell: Cell, *names: str) -> set[str]:
    records = [await cell.job(JobId(f"c0-{name}")) for name in names]
    return {record.state if record else "unknown" for record in records}


async def test_a_job_is_assigned_and_keeps_the_terms_of_its_score(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "a")
    async with dispatching():
        await submit(cell, "j")
        await wait_until(node.running)

    (work,) = await node.take()
    record = await cell.job(work.job_id)
    assert record is not None
    (terms,) = json.loads(record.score)
    assert terms["node"] == "a" and terms["cost_ms"] == 10.0  # 10 prompt tokens at 1000 a second, nothing ahead


async def test_jobs_that_waited_before_the_dispatcher_came_are_assigned_in_order(
    cell: Cell, dispatching: Dispatching
) -> None:
    """Wakes from before its start are never needed: it looks at everything at boot."""
    node = await HandNode.join(cell, "a", capacity=3)
    await submit(cell, *(f"j{index}" for index in range(5)))
    await cell.link.send("DEL", cell.keys.wake)

    async with dispatching():
        await wait_until(node.running)
        first = await node.take()
        await node.finish(first)
        await wait_until(node.running)
        second = await node.take()

    assert [one.job_id for one in first + second] == [f"c0-j{index}" for index in range(5)]


async def test_room_is_used_as_soon_as_it_appears(cell: Cell, dispatching: Dispatching) -> None:
    """A finish wakes the dispatcher; waiting for a timeout would cost every saturated fleet half its time."""
    node = await HandNode.join(cell, "a", capacity=1)
    async with dispatching(block_ms=5_000, sweep_ms=5_000):
        await submit(cell, "j0", "j1", "j2")
        await wait_until(node.running)
        begun = time.monotonic()
        for _ in range(2):
            await node.finish(await node.take())
            await wait_until(node.running, step_s=0.001)
        took_s = time.monotonic() - begun

    assert took_s < 1.0


async def test_room_and_work_that_appear_during_a_pass_are_not_missed(cell: Cell, dispatching: Dispatching) -> None:
    """Between a look and what is remembered of it, a wake may come: no timeout may be needed to find it."""
    node = await HandNode.join(cell, "a", capacity=1)
    rng = random.Random(5)
    submitted = finished = 0
    async with dispatching(block_ms=30_000, renew_ms=7_500):
        for _ in range(200):
            calls: list[Coroutine[Any, Any, object]] = []
            if submitted > finished:
                calls.append(node.finish(await node.take()))
                finished += 1
            for _ in range(rng.choice([0, 1, 1, 2]) if submitted - finished < 3 else 0):
                calls.append(submit(cell, f"j{submitted}"))
                submitted += 1
            rng.shuffle(calls)
            for call in calls:
                await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.002]))
                await call
            if submitted > finished:
                await wait_until(node.running, timeout_s=2, step_s=0.0005)

    assert submitted > 100


async def test_a_batch_spreads_over_the_nodes_by_their_promised_tokens(cell: Cell, dispatching: Dispatching) -> None:
    nodes = [await HandNode.join(cell, name, capacity=20) for name in ("a", "b", "c")]
    await submit(cell, *(f"j{index}" for index in range(30)))
    async with dispatching():
        await wait_until(lambda: _all_running(nodes, 30))

    assert [await node.running() for node in nodes] == [10, 10, 10]


async def _all_running(nodes: list[HandNode], count: int) -> bool:
    return sum([await node.running() for node in nodes]) == count


async def test_a_job_handed_back_goes_before_new_ones(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "a", capacity=1)
    await submit(cell, "first", "second")
    async with dispatching():
        await wait_until(node.running)
        (work,) = await node.take()
        assert work.job_id == "c0-first"
        await cell.requeue(work.job_id, work.fence, "drain")
        await wait_until(node.running)
        (again,) = await node.take()

    assert again.job_id == "c0-first"


async def test_a_job_that_failed_on_one_node_goes_to_the_other_after_its_back_off(
    cell: Cell, dispatching: Dispatching
) -> None:
    nodes = {name: await HandNode.join(cell, name) for name in ("a", "b")}
    async with dispatching():
        await submit(cell, "j")
        await wait_until(lambda: _all_running(list(nodes.values()), 1))
        (failed,) = [node for node in nodes.values() if await node.running()]
        (work,) = await failed.take()
        back = await cell.requeue(work.job_id, work.fence, "node_error", "refused connection")
        assert isinstance(back, Requeued) and back.due_ms > 0
        (other,) = [node for node in nodes.values() if node is not failed]
        await wait_until(other.running)

    assert await failed.running() == 0


async def test_two_dispatchers_never_promise_more_than_a_node_has(cell: Cell, dispatching: Dispatching) -> None:
    """Both see every queue here: heads are stale at once."""
    nodes = [await HandNode.join(cell, name, capacity=4) for name in ("a", "b", "c")]
    jobs = [f"j{index}" for index in range(200)]
    done: list[str] = []
    async with dispatching(2, take_over_ms=10):
        await submit(cell, *jobs)
        async with asyncio.timeout(20):
            while len(done) < len(jobs):
                for node in nodes:
                    assert await node.running() <= 4
                    work = await node.take()
                    done += [one.job_id for one in work]
                    await node.finish(work)
                await asyncio.sleep(0)

    assert sorted(done) == sorted(f"c0-{name}" for name in jobs)
    assert await states(cell, *jobs) == {"done"}


async def test_a_queue_whose_owner_does_nothing_is_served_by_another(cell: Cell, dispatching: Dispatching) -> None:
    """A dispatcher that hangs keeps its lease for a while; its queues must not wait for that."""
    node = await HandNode.join(cell, "a")
    ghosts = [f"{HOLDER_PREFIX}ghost{index}" for index in range(30)]
    for ghost in ghosts:
        await cell.lease(ghost)
    async with dispatching(block_ms=5_000):
        await asyncio.sleep(0.3)  # so that it knows them
        await submit(cell, "j")
        begun = time.monotonic()
        await wait_until(node.running)

    assert time.monotonic() - begun < 3.0
    assert rendezvous(MODEL, [*ghosts, "me"])[0] != "me"


async def test_foreign_entries_of_wake_become_dead_letters_and_the_next_one_counts(
    cell: Cell, dispatching: Dispatching
) -> None:
    node = await HandNode.join(cell, "a")
    send, wake = cell.link.send, cell.keys.wake
    async with dispatching(block_ms=5_000):
        await submit(cell, "j0")
        await wait_until(node.running)
        await send("XADD", wake, "*", "hello", "world")
        await send("XADD", wake, "*", "queue", b"\xff\x00", "job", "x")
        await send("XADD", wake, "*", "queue", "no such queue", "job", "x")
        await send("XADD", wake, "*", "queue", "m:7", "job", "x")
        await wait_until(lambda: _length(cell, cell.keys.dead, 4))
        await submit(cell, "j1")
        await wait_until(lambda: _all_running([node], 2))


async def _length(cell: Cell, key: str, length: int) -> bool:
    return int(await cell.link.send("XLEN", key)) == length


async def test_foreign_entries_of_a_queue_do_not_hold_up_their_neighbours(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "a")
    queue = cell.keys.queue(queue_name(MODEL, 1))
    await submit(cell, "j0")
    await cell.link.send("XADD", queue, "*", "hello", "world")
    await cell.link.send("XADD", queue, "*", "job", "c0-ghost", "fence", "0.0", "out", "gateway:g", "alone", "x")
    await submit(cell, "j1")
    async with dispatching():
        await wait_until(lambda: _all_running([node], 2))
        await wait_until(lambda: _length(cell, queue, 0))

    assert await cell.link.send("XLEN", cell.keys.dead) == 2


async def test_after_a_flush_it_serves_what_comes_anew(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "a")
    async with dispatching():
        await submit(cell, "j0")
        await wait_until(node.running)
        await cell.link.send("FLUSHALL")
        await node.cell.lease(node.holder)
        await node.beat()
        await submit(cell, "j1")
        await wait_until(lambda: states_are(cell, "j1", "running"))


async def test_cut_connections_lose_no_job_and_give_none_twice(cell: Cell, dispatching: Dispatching) -> None:
    """Each cut leaves commands whose outcome nobody knows; the next look does."""
    rng = random.Random(11)
    nodes = [await HandNode.join(cell, name, capacity=8) for name in ("a", "b")]
    jobs = [f"j{index}" for index in range(120)]
    done: list[str] = []
    async with dispatching(renew_ms=100), asyncio.timeout(20):
        for name in jobs:
            await submit(cell, name)
            if rng.random() < 0.15:
                await _cut(cell, "dispatcher.")
            for node in nodes:
                work = await node.take()
                done += [one.job_id for one in work]
                await node.finish(work)
        while len(done) < len(jobs):
            for node in nodes:
                work = await node.take()
                done += [one.job_id for one in work]
                await node.finish(work)
            await asyncio.sleep(0.01)

    assert sorted(done) == sorted(f"c0-{name}" for name in jobs)
    assert await states(cell, *jobs) == {"done"}
    assert await cell.link.send("XLEN", cell.keys.dead) == 0


async def _cut(cell: Cell, name: str) -> None:
    """Close the server's end of every connection with this name."""
    for line in (await cell.link.send("CLIENT", "LIST")).decode().splitlines():
        fields = dict(pair.partition("=")[::2] for pair in line.split())
        if fields["name"].startswith(name):
            await cell.link.send("CLIENT", "KILL", "ID", fields["id"])


async def test_a_killed_and_restarted_server_finds_it_at_work_again(
    own_server: ValkeyServer, settings: Settings
) -> None:
    """Links come back by themselves, cursors are checked, and what the server kept is served."""
    changed = settings.changed(redis_url=own_server.url)
    parent = ParentLine()
    async with await Link.connect(ServerAddress.parse(own_server.url), name="test") as link:
        cell = Cell(link, 0, changed)
        async with asyncio.TaskGroup() as group:
            group.create_task(run(changed, parent))
            node = await HandNode.join(cell, "a")
            await submit(cell, "j0")
            await wait_until(node.running)
            await asyncio.sleep(1.1)  # the log reaches the disk each second

            own_server.kill()
            own_server.start()
            await wait_until(lambda: link.generation > 1)
            await node.beat()
            await submit(cell, "j1")
            await wait_until(lambda: _all_running([node], 2), timeout_s=10)
            parent.stop.set()


async def states_are(cell: Cell, name: str, state: str) -> bool:
    return await states(cell, name) == {state}


async def test_a_job_past_its_deadline_is_ended_by_the_sweep(cell: Cell, dispatching: Dispatching) -> None:
    await HandNode.join(cell, "a", capacity=1)
    async with dispatching():
        await submit(cell, "busy")
        await submit(cell, "late", deadline_in_ms=200)
        await wait_until(lambda: states_are(cell, "late", "failed"))


async def test_a_stopped_dispatcher_leaves_no_lease_and_no_consumer(cell: Cell, dispatching: Dispatching) -> None:
    async with dispatching():
        await wait_until(lambda: cell.link.send("ZCARD", cell.keys.leases))
        await wait_until(lambda: cell.link.send("EXISTS", cell.keys.jobs))

    now_ms = (await cell.look()).now_ms
    assert await cell.link.send("ZCOUNT", cell.keys.leases, now_ms, "+inf") == 0
    assert await cell.link.send("XINFO", "CONSUMERS", cell.keys.jobs, "dispatcher") == []


@pytest.mark.parametrize("victims", [1, 5])
async def test_a_poison_job_runs_alone_and_its_neighbours_go_on(
    cell: Cell, dispatching: Dispatching, victims: int
) -> None:
    """After the second crash the job is given an empty node; the third ends it."""
    node = await HandNode.join(cell, "a", capacity=8)
    async with dispatching():
        await submit(cell, "poison")
        for _ in range(2):
            await wait_until(node.running)
            (work,) = await node.take()
            await cell.requeue(work.job_id, work.fence, "crash")
        await submit(cell, *(f"good{index}" for index in range(victims)))
        done: list[str] = []
        async with asyncio.timeout(10):
            while len(done) < victims + 1:
                work_now = await node.take()
                if any(one.job_id == "c0-poison" for one in work_now):
                    assert await node.running() == 1
                done += [one.job_id for one in work_now]
                await node.finish(work_now)
                await asyncio.sleep(0.005)

    assert sorted(done) == sorted(["c0-poison", *(f"c0-good{index}" for index in range(victims))])


async def test_a_pick_of_a_job_that_is_gone_clears_its_entry(cell: Cell) -> None:
    """What the dispatcher relies on when it looks at a queue with leftovers."""
    node = await HandNode.join(cell, "a")
    await submit(cell, "j")
    view = await cell.look()
    (head,) = view.queues[0].heads
    pick = Pick(head.entry_id, head.job_id, head.fence, head.out, (node.node,), new_nonce())

    (first,) = await cell.assign(view.queues[0].queue, [pick])
    (second,) = await cell.assign(view.queues[0].queue, [pick])

    assert isinstance(first, Assigned) and not isinstance(second, Assigned)


def test_the_log_says_why_a_node_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """Seconds after a clean stop, "no beat for an hour" would send an operator looking for a fault."""
    caplog.set_level("INFO")

    log_sweep(SweepReport(swept=True, removed_nodes=(NodeId("lost"), NodeId("left")), departed_nodes=(NodeId("left"),)))

    assert [(vars(one)["node"], vars(one)["why"]) for one in caplog.records] == [
        ("lost", "no beat for node_keep_ms"),
        ("left", "it said bye"),
    ]
