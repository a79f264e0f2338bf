"""Jobs that ask for what not every node can do: given to nodes that can, ended where none can."""

import asyncio
import random

from msgspec.structs import replace

from bus.cell import Cell
from bus.codec.events import NodeBye
from bus.codec.wire import NO_FENCE, CellView, NodeView, QueuedJob, QueueView
from bus.ids import JobId, ModelName, NodeId
from bus.jobs import ChatJob
from bus.keys import QueueName, queue_name
from dispatcher.plan import plan, unserved
from dispatcher.rank import Node
from dispatcher.views import to_nodes
from tests.conftest import wait_until
from tests.dispatcher.conftest import Dispatching
from tests.dispatcher.hands import MODEL, HandNode, submit

LOGPROBS = ("logprobs",)
QUEUE = queue_name(ModelName(MODEL), 1)
ASKING = ChatJob(model=ModelName(MODEL), prompt="Hello", max_tokens=16, logprobs=1)


def waiting(name: str, **fields: object) -> QueuedJob:
    return replace(QueuedJob("1-0", JobId(name), NO_FENCE, "gateway:g", 10, 50, 0, needs=LOGPROBS), **fields)


def seen(name: str, **fields: object) -> NodeView:
    plain = NodeView(NodeId(name), "up", True, True, "o", "torch", (MODEL,), 4, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0, "", 0)
    return replace(plain, **fields)


def view(job: QueuedJob, *nodes: NodeView) -> CellView:
    return CellView(1, (QueueView(QUEUE, 1, (job,)),), {node.node: node for node in nodes})


def in_vain(view: CellView) -> list[tuple[QueueName, QueuedJob]]:
    return unserved(view.queues, view, to_nodes(view))


def chosen(job: QueuedJob, *nodes: Node) -> list[str]:
    queues = [QueueView(QUEUE, 1, (job,))]
    choices = plan(queues, {ModelName(MODEL): nodes}, 1, 0, lambda: 0.0)
    return [score.node for choice in choices for score in choice.scores]


def test_only_nodes_that_can_are_named_however_busy() -> None:
    nodes = [
        Node(NodeId("no"), 9, can=()),
        Node(NodeId("busy"), 9, 5, promised_new=900, can=LOGPROBS),
        Node(NodeId("refused"), 9, cannot=LOGPROBS),
        Node(NodeId("unsaid"), 9),
    ]

    assert chosen(waiting("j"), *nodes) == ["unsaid", "busy"]
    assert set(chosen(waiting("j", needs=()), *nodes)) == {"no", "refused", "unsaid"}


def test_a_pass_looks_through_a_large_fleet_once_for_all_jobs_with_the_same_needs() -> None:
    """Else a few waiting jobs would hold up the dispatcher's loop for as long as the fleet is large."""
    looked: list[str] = []

    class Counted(frozenset[str]):
        def __contains__(self, need: object) -> bool:
            looked.append(str(need))
            return super().__contains__(need)

    nodes = [Node(NodeId(f"n{at}"), 1, promised_new=at, can=Counted(LOGPROBS if at % 2 else ())) for at in range(300)]
    jobs = tuple(waiting(f"j{at}", needs=LOGPROBS if at % 4 else ()) for at in range(64))

    choices = plan([QueueView(QUEUE, 64, jobs)], {ModelName(MODEL): nodes}, 1, 0, random.Random(3).random)

    assert len(choices) == 64
    assert len(looked) <= len(nodes)
    assert max(choice.scores[0].candidates for choice in choices) == 64
    given = {choice.job.job_id: int(choice.scores[0].node[1:]) for choice in choices}
    assert len(set(given.values())) == 64, "a node that one kind of job has filled is left out for the other"
    assert all(given[job.job_id] % 2 for job in jobs if job.needs)


def test_a_node_that_failed_the_job_is_better_than_one_that_cannot() -> None:
    job = waiting("j", avoid=(NodeId("failed"),))

    assert chosen(job, Node(NodeId("no"), 9, can=()), Node(NodeId("failed"), 9)) == ["failed"]


def test_a_node_that_refused_the_job_is_not_named_though_all_are_to_be_avoided() -> None:
    job = waiting("j", avoid=(NodeId("failed"), NodeId("said")), refused=(NodeId("said"),))
    nodes = Node(NodeId("said"), 9), Node(NodeId("failed"), 9)

    assert chosen(job, *nodes) == ["failed"]
    assert chosen(job, nodes[0]) == []
    assert in_vain(view(job, seen("said"))) == [(QUEUE, job)]
    assert in_vain(view(job, seen("failed"))) == []


def test_a_job_waits_in_vain_only_where_a_node_lives_and_none_that_is_known_can() -> None:
    job, plain = waiting("j"), waiting("j", needs=())
    no, away = seen("no", can=()), seen("away", alive=False)

    assert in_vain(view(job, no)) == [(QUEUE, job)]
    assert in_vain(view(job, no, away)) == []
    assert in_vain(view(job)) == []
    assert in_vain(view(job, replace(no, alive=False))) == []
    assert in_vain(view(plain, no)) == []


async def test_a_mixed_fleet_gives_such_jobs_to_nodes_that_can(cell: Cell, dispatching: Dispatching) -> None:
    """Also without a look, where a wake brings the job and the nodes are known."""
    can = await HandNode.join(cell, "can", capacity=9, can=LOGPROBS)
    no = await HandNode.join(cell, "no", capacity=9, can=())
    async with dispatching():
        for index in range(6):
            await submit(cell, f"j{index}", job=ASKING)
        await submit(cell, *(f"p{index}" for index in range(3)))

        async def all_given() -> bool:
            return await can.running() + await no.running() == 9

        await wait_until(all_given)

    assert {f"c0-j{index}" for index in range(6)} <= {one.job_id for one in await can.take()}


async def test_a_refused_job_is_answered_by_the_node_that_can(cell: Cell, dispatching: Dispatching) -> None:
    unsaid = await HandNode.join(cell, "unsaid", capacity=1)
    async with dispatching():
        await submit(cell, "j", job=ASKING)
        await wait_until(unsaid.running)
        (one,) = await unsaid.take()
        can = await HandNode.join(cell, "can", can=LOGPROBS)

        await cell.requeue(one.job_id, one.fence, "unable", "it has none", "logprobs")
        await wait_until(can.running)
        (two,) = await can.take()
        await can.finish([two])

    assert two.job_id == one.job_id
    record = await cell.job(one.job_id)
    assert record is not None and record.state == "done"


async def test_jobs_that_wait_behind_a_refusal_end_with_it(cell: Cell, dispatching: Dispatching) -> None:
    """They were taken while their node had not said that it cannot: nobody keeps them until their deadline."""
    node = await HandNode.join(cell, "unsaid", capacity=1)
    async with dispatching():
        await submit(cell, "first", "second", "third", job=ASKING)
        await submit(cell, "plain")
        await wait_until(node.running)
        (one,) = await node.take()

        await cell.requeue(one.job_id, one.fence, "unable", "it has none", "logprobs")

        async def all_ended() -> bool:
            records = [await cell.job(JobId(f"c0-{name}")) for name in ("first", "second", "third")]
            return all(record is not None and record.error_code == "unsupported" for record in records)

        await wait_until(all_ended)
        await wait_until(node.running)
        (plain,) = await node.take()

    assert plain.job_id == "c0-plain"


async def test_jobs_outlive_a_graceful_restart_of_the_only_node_that_can(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "can", capacity=1, can=LOGPROBS)
    await HandNode.join(cell, "no", capacity=2, can=())
    async with dispatching():
        await submit(cell, "runs", "waits", job=ASKING)
        await wait_until(node.running)
        (one,) = await node.take()
        await cell.link.send("HSET", cell.keys.node(node.node), "state", "draining")
        await cell.requeue(one.job_id, one.fence, "drain")
        bye = NodeBye(node.node, int(one.owner.rpartition(".")[2]))
        await cell.apply_events([(await cell.publish_node_event(bye), bye)])
        for index in range(10):
            await submit(cell, f"p{index}")
            await asyncio.sleep(0.05)
        records = [await cell.job(JobId(f"c0-{name}")) for name in ("runs", "waits")]
        again = await HandNode.join(cell, "can", capacity=2, can=LOGPROBS)

        async def both_run() -> bool:
            return await again.running() == 2

        await wait_until(both_run)

    assert [record.state for record in records if record is not None] == ["queued", "queued"]


async def test_an_entry_of_an_older_release_that_names_no_needs_finds_the_node_that_can(
    cell: Cell, dispatching: Dispatching
) -> None:
    can = await HandNode.join(cell, "can", capacity=2, can=LOGPROBS)
    async with dispatching():
        await submit(cell, "load", est_new=5_000)
        await wait_until(can.running)
    for number in range(4):
        await HandNode.join(cell, f"no{number}", can=())
    await submit(cell, "j", job=ASKING)
    key, send = cell.keys.queue(QUEUE), cell.link.send
    ((entry, words),) = await send("XRANGE", key, "-", "+")
    await send("DEL", key, cell.keys.wake)
    await send("XADD", key, entry, *words[: words.index(b"needs")])

    async def both_run() -> bool:
        return await can.running() == 2

    async with dispatching():
        await wait_until(both_run)


async def test_a_node_that_learns_it_wakes_the_jobs_that_wait_for_it(cell: Cell, dispatching: Dispatching) -> None:
    node = await HandNode.join(cell, "a", can=())
    async with dispatching(block_ms=20_000, renew_ms=15_000, self_fence_ms=40_000):
        away = await HandNode.join(cell, "b", can=LOGPROBS)
        await cell.link.send("HSET", cell.keys.node(away.node), "state", "draining")
        await submit(cell, "j", job=ASKING)
        await asyncio.sleep(0.1)
        assert not await node.running()

        await node.beat(can=LOGPROBS)

        await wait_until(node.running)
