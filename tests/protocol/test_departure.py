"""A node that leaves, dies or changes: its work goes on at once, and none of its keys stays for ever."""

from bus.codec.events import NodeBye
from bus.codec.wire import Owned
from bus.ids import Holder, NodeId
from bus.keys import queue_name
from tests.protocol.world import GATEWAY, MODEL, World, chat

N1 = NodeId("n1")


async def keys_of(world: World, node: str) -> dict[str, int]:
    """The node's keys that have no TTL."""
    found = {}
    for raw in await world.link.send("KEYS", f"*node:{node}*"):
        if await world.link.send("PTTL", raw) < 0:
            found[raw.decode().removeprefix(world.cell.keys.prefix)] = -1
    return found


async def wakes(world: World) -> int:
    return int(await world.link.send("XLEN", world.cell.keys.wake))


async def restart(world: World, name: str, *models: str) -> None:
    """Another process under the node's id, with other models."""
    await world.cell.drop_lease(world.holders[NodeId(name)])
    owned = await world.cell.own(NodeId(name), name)
    assert isinstance(owned, Owned)
    world.holders[NodeId(name)] = owned.holder
    await world.beat(name, models=models)


async def test_a_new_owner_hands_back_what_the_one_before_left(world: World):
    """The parent's `down` may come after the new child's `own`: then it finds another owner and does nothing."""
    holder = await world.node()
    one = await world.start()
    await world.flush(one, 0, b"x")
    await world.cell.drop_lease(holder)
    owned = await world.cell.own(N1, "n1")

    downed = await world.cell.down(N1, holder)

    record = await world.cell.job(one.job_id)
    assert isinstance(owned, Owned) and owned.left == (f"{one.job_id}/{one.fence}",)
    assert downed == []
    assert record is not None and (record.state, record.crashes) == ("queued", 1)
    assert await world.running() == []


async def test_a_relay_hands_back_what_another_left_but_never_its_own(world: World):
    relay = await world.http_node("h1")
    one = await world.start("h1")
    await world.cell.renew(NodeId("h1"), relay, [(one.job_id, one.fence)])

    again = await world.cell.adopt(NodeId("h1"), relay)
    mine = await world.state(one.job_id)
    await world.age_lease(relay)
    await world.cell.lease("relay.2")
    await world.cell.adopt(NodeId("h1"), Holder("relay.2"))

    record = await world.cell.job(one.job_id)
    assert isinstance(again, Owned) and (again.left, mine) == ((), "running")
    assert record is not None and (record.state, record.relay_losses) == ("queued", 1)


async def test_what_a_departed_node_held_goes_on_with_the_next_sweep_and_counts_nothing(world: World):
    relay = await world.http_node("h1")
    one = await world.start("h1")
    await world.cell.renew(NodeId("h1"), relay, [(one.job_id, one.fence)])
    await world.end_grace()
    view = await world.cell.node(NodeId("h1"))
    assert view is not None
    await world.publish(NodeBye(NodeId("h1"), view.epoch, "k1"))

    report = await world.sweep()

    record = await world.cell.job(one.job_id)
    assert [reply.why for reply in report.requeued] == ["drain"]
    assert record is not None and (record.state, record.relay_losses, record.crashes) == ("queued", 0, 0)


async def test_a_departed_node_leaves_nothing_but_a_tombstone_that_expires(world: World):
    holder = await world.node()
    await world.finish(await world.start())
    await world.end_grace()
    await world.publish(NodeBye(N1, int(holder.rpartition(".")[2])))
    counted = await world.cell.nodes()

    report = await world.sweep()

    assert counted == []
    assert report.removed_nodes == report.departed_nodes == (N1,)
    assert await world.link.send("KEYS", "*node:n1*") == [world.cell.keys.node(N1).encode()]
    assert await keys_of(world, "n1") == {}
    assert await world.cell.node_names() == []


async def test_a_departed_nodes_lock_stays_with_who_is_registering_it_again(world: World):
    await world.node()
    await world.cell.lock_node(N1, 60_000)
    await world.publish(NodeBye(N1, int(world.holders[N1].rpartition(".")[2])))

    await world.cell.remove_node(N1)

    assert await world.link.send("EXISTS", world.cell.keys.node_lock(N1)) == 1


async def test_a_node_that_died_before_its_first_beat_is_removed_like_any_other(world: World):
    await world.cell.own(N1, "n1")
    await world.group(world.cell.keys.node_jobs(N1), "workers")
    booting = await world.cell.remove_node(N1)
    await world.link.send("ZADD", world.cell.keys.nodes_known, 1000, N1)

    report = await world.sweep()

    assert booting.status == "held"
    assert report.removed_nodes == (N1,)
    assert await world.link.send("KEYS", "*node:n1*") == []


async def test_a_node_that_still_starts_is_not_reported_as_silent(world: World):
    await world.cell.own(N1, "n1")
    (beat,) = [
        int(raw) for raw in (await world.link.send("ZRANGE", world.cell.keys.nodes_known, 0, -1, "WITHSCORES"))[1::2]
    ]

    assert not await world.cell.note_silent(N1, beat)


async def test_a_requeue_makes_no_hash_of_a_node_that_was_removed(world: World):
    await world.node()
    ones = [await world.start() for _ in range(2)]
    await world.link.send("DEL", world.cell.keys.node(N1))

    for one, why in zip(ones, ("node_error", "crash"), strict=True):
        await world.cell.requeue(one.job_id, one.fence, why)  # type: ignore[arg-type]  # both are reasons

    assert await world.link.send("EXISTS", world.cell.keys.node(N1)) == 0


async def test_a_node_back_with_another_model_no_longer_counts_for_the_first(world: World):
    await world.node("a")
    await world.node("b")
    one = await world.start("a")
    await restart(world, "b", "other")
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.link.send("HSET", world.cell.keys.node(NodeId("a")), "breaker_n", 0, "breaker_until", 0)
    await world.age_late()
    await world.sweep()

    await world.dispatch("a", "b")

    assert await world.state(one.job_id) == "running"
    assert await world.link.send("ZRANGE", world.cell.keys.model(MODEL), 0, -1) == [b"a"]


async def test_a_submit_for_a_model_that_its_last_node_gave_up_is_refused_at_once(world: World):
    await world.node("b")
    await restart(world, "b", "other")

    assert (await world.refused()).code == "no_model"


async def test_a_node_that_now_holds_only_a_part_of_the_model_leaves_those_that_serve_it(world: World):
    await world.node("b")
    await world.beat("b", whole=False, layers=(0, 1), layer_count=3)

    assert (await world.refused()).code == "uncovered"


async def test_many_dead_nodes_of_the_model_hide_no_living_one(world: World):
    """The longest silent come first in the zset; whoever beat last says whether another node lives."""
    now = (await world.cell.look()).now_ms
    dead = [word for at in range(300) for word in (now - 100_000 - at, f"dead{at}")]
    await world.node("a")
    one = await world.start("a")
    await world.node("b", capacity=0)
    await world.link.send("ZADD", world.cell.keys.model(MODEL), *dead)
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.link.send("HSET", world.cell.keys.node(NodeId("a")), "breaker_n", 0, "breaker_until", 0)
    await world.age_late()
    await world.sweep()

    await world.dispatch("a", "b")

    assert await world.state(one.job_id) == "queued"


async def test_a_finish_wakes_those_who_wait_for_any_model_of_the_node(world: World):
    await world.node(capacity=1, models=(MODEL, "m2"))
    one = await world.start()
    await world.submit(job=chat(model="m2"))
    before = await wakes(world)

    await world.finish(one)

    assert await wakes(world) == before + 1
    assert (await world.cell.look([queue_name("m2", 1)])).queues[0].length == 1


async def test_a_beat_is_a_wake_when_the_node_takes_more_than_before_and_only_then(world: World):
    await world.node(capacity=1)
    before = await wakes(world)
    await world.beat("n1", capacity=1)
    same = await wakes(world)
    await world.beat("n1", capacity=2)
    more = await wakes(world)
    await world.beat("n1", capacity=2, models=(MODEL, "m2"))

    assert (same, more, await wakes(world)) == (before, before + 1, before + 2)
    assert await world.link.send("EXISTS", world.cell.keys.gateway(GATEWAY)) == 0
