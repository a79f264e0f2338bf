"""Nodes: who owns one, who may beat for it, and what revives nobody."""

from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeRegistered
from bus.codec.wire import HeldBy, LockBusy, LockTaken, Owned
from bus.ids import Fence, Holder, JobId, NodeId
from tests.protocol.world import MODEL, World

N1 = NodeId("n1")


async def test_an_owner_with_a_living_lease_keeps_its_node(world: World):
    holder = await world.node()

    held = await world.cell.own(N1, "n1")
    await world.age_lease(holder)
    owned = await world.cell.own(N1, "n1")

    assert isinstance(held, HeldBy) and held.holder == holder and held.expires_ms > 0
    assert isinstance(owned, Owned) and owned.epoch > int(holder.rpartition(".")[2])


async def test_a_new_owner_is_not_alive_before_its_first_beat(world: World):
    """The process before it may have beaten a second ago; this one still loads its model."""
    await world.age_lease(await world.node())

    owned = await world.cell.own(N1, "n1")
    before = await world.cell.node(N1)
    assert isinstance(owned, Owned)
    world.holders[N1] = owned.holder
    await world.beat("n1")
    after = await world.cell.node(N1)

    assert before is not None and after is not None
    assert (before.alive, before.state) == (False, "starting")
    assert (after.alive, after.state) == (True, "up")


async def test_own_names_the_reservations_that_were_left(world: World):
    await world.node()
    one = await world.start()
    await world.age_lease(one.owner)

    owned = await world.cell.own(N1, "n1")

    assert isinstance(owned, Owned) and owned.left == (f"{one.job_id}/{one.fence}",)


async def test_renew_extends_lease_and_reservations_and_names_those_that_must_stop(world: World):
    holder = await world.node(capacity=5)
    mine, zombie, unlisted = [await world.start() for _ in range(3)]
    await world.cell.requeue(zombie.job_id, zombie.fence, "drain")
    await world.age_lease(holder)
    await world.age_reservations()

    renewed = await world.cell.renew(
        N1,
        holder,
        [(mine.job_id, mine.fence), (zombie.job_id, zombie.fence), (JobId("c0-none"), Fence("1.x"))],
    )

    assert renewed.stop == {f"{zombie.job_id}/{zombie.fence}": "queued", "c0-none/1.x": "unknown"}
    assert renewed.others == (f"{unlisted.job_id}/{unlisted.fence}",)
    view = await world.cell.node(N1)
    assert view is not None and view.leased
    scores = dict(
        zip(
            *[iter(await world.link.send("ZRANGE", world.cell.keys.node_running(N1), 0, -1, "WITHSCORES"))] * 2,
            strict=True,
        )
    )
    assert {member.decode(): float(score) > 1000 for member, score in scores.items()} == {
        f"{mine.job_id}/{mine.fence}": True,
        f"{unlisted.job_id}/{unlisted.fence}": False,
    }
    record = await world.cell.job(mine.job_id)
    assert record is not None and record.started_ms > 0


async def test_beats_out_of_order_leave_the_newest(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])
    beats = [NodeBeat(N1, epoch, holder, "echo", (MODEL,), capacity=size) for size in (5, 6, 7)]
    entries = [(await world.cell.publish_node_event(beat), beat) for beat in beats]

    statuses = await world.cell.apply_events([entries[2], entries[0], entries[1], entries[2]])

    assert [one.status for one in statuses] == ["applied", "superseded", "superseded", "superseded"]
    view = await world.cell.node(N1)
    assert view is not None and view.capacity == 7


async def test_a_beat_older_than_its_ttl_revives_nobody(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])
    now = (await world.cell.look()).now_ms
    old = (f"{now - 40_000}-0", NodeBeat(N1, epoch + 1, holder, "echo", (MODEL,), capacity=1))
    await world.link.send("DEL", world.cell.keys.node_alive(N1))

    (applied,) = await world.cell.apply_events([old])

    assert applied.status == "expired"
    view = await world.cell.node(N1)
    assert view is not None and not view.alive


async def test_the_ttl_counts_from_the_entry_not_from_its_application(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])
    now = (await world.cell.look()).now_ms
    await world.cell.apply_events(
        [(f"{now - 20_000}-0", NodeBeat(N1, epoch + 1, holder, "echo", (MODEL,), capacity=1))]
    )

    left = await world.link.send("PTTL", world.cell.keys.node_alive(N1))

    assert 5_000 < left <= 10_000


async def test_a_beat_of_an_older_epoch_is_superseded(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])

    status = await world.publish(NodeBeat(N1, epoch - 1, Holder("n1.old"), "echo", (MODEL,), capacity=9))

    assert status == "superseded"


async def test_a_workers_beat_recreates_its_node_after_everything_was_lost(world: World):
    await world.node()
    await world.link.send("FLUSHALL")

    status = await world.beat("n1", capacity=3)

    view = await world.cell.node(N1)
    assert status == "applied"
    assert view is not None and (view.owner, view.capacity, view.alive) == (world.holders[N1], 3, True)
    assert await world.cell.node_names() == [N1]


async def test_bye_leaves_a_tombstone_that_only_a_new_epoch_overcomes(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])
    await world.publish(NodeBye(N1, epoch))

    late = await world.beat("n1")
    gone = await world.cell.nodes()
    await world.age_lease(holder)
    await world.node()

    assert (late, gone) == ("departed", [])
    assert [view.node for view in await world.cell.nodes()] == [N1]


async def test_a_node_that_drains_stays_so_whatever_beats_follow_in_its_epoch(world: World):
    holder = await world.node()
    epoch = int(holder.rpartition(".")[2])

    await world.publish(NodeDrain(N1, epoch))
    await world.beat("n1")

    view = await world.cell.node(N1)
    assert view is not None and view.state == "draining" and not view.usable(0)


async def test_an_http_beat_creates_no_node_and_needs_the_key_that_registered_it(world: World):
    unknown = await world.http_beat("h1")
    await world.http_node("h1", key_id="k1")
    mine, foreign = await world.http_beat("h1", "k1"), await world.http_beat("h1", "k2")
    torch = await world.node("t1") and await world.http_beat("t1")

    assert (unknown, mine, foreign, torch) == ("unknown", "applied", "not_owner", "unknown")


async def test_an_http_beat_keeps_its_node_alive(world: World):
    await world.http_node("h1")
    await world.link.send("DEL", world.cell.keys.node_alive(NodeId("h1")))

    await world.http_beat("h1")

    view = await world.cell.node(NodeId("h1"))
    assert view is not None and view.alive


async def test_a_registration_is_answered_on_the_asking_gateways_stream(world: World):
    lock = await world.cell.lock_node(NodeId("h1"), 1000)
    assert isinstance(lock, LockTaken)
    event = NodeRegistered(
        NodeId("h1"), lock.epoch, "k1", "http://n", (MODEL,), layers=(0, 1), answer_to="gateway:g1", answer_id="r7"
    )

    status = await world.publish(event)

    (answer,) = await world.out()
    assert status == "applied"
    assert (answer.id, answer.status, answer.detail) == ("r7", "applied", '{"layers":[0,1]}')  # type: ignore[union-attr]
    view = await world.cell.node(NodeId("h1"))
    assert view is not None and (view.kind, view.layers, view.api_url, view.alive) == ("http", (0, 1), "http://n", True)


async def test_a_registration_needs_the_owners_key_and_the_newest_token(world: World):
    await world.http_node("h1", key_id="k1")
    stored = await world.cell.node(NodeId("h1"))
    assert stored is not None

    def registration(epoch: int, key_id: str) -> NodeRegistered:
        return NodeRegistered(NodeId("h1"), epoch, key_id, "http://other", (MODEL,))

    statuses = [
        await world.publish(registration(stored.epoch + 5, "k2")),
        await world.publish(registration(stored.epoch, "k1")),
        await world.publish(registration(stored.epoch + 5, "k1")),
    ]

    assert statuses == ["not_owner", "superseded", "applied"]


async def test_a_registration_delivered_twice_is_applied_once_and_answered_alike(world: World):
    event = NodeRegistered(NodeId("h1"), 9, "k1", "http://n", (MODEL,))
    entry = await world.cell.publish_node_event(event)

    statuses = await world.cell.apply_events([(entry, event), (entry, event)])

    assert [one.status for one in statuses] == ["applied", "applied"]


async def test_a_workers_node_cannot_be_registered_over_http_nor_the_other_way_round(world: World):
    await world.node("n1")
    await world.http_node("h1")

    stolen = await world.publish(NodeRegistered(N1, 9_999_999_999_999, "k1", "http://n", (MODEL,)))
    held = await world.cell.own(NodeId("h1"), "h1")
    await world.age_lease("relay.1")
    still = await world.cell.own(NodeId("h1"), "h1")

    assert stolen == "not_owner"
    assert isinstance(held, HeldBy) and isinstance(still, HeldBy)


async def test_a_relay_needs_its_lease_to_adopt_and_leaves_a_living_relay_its_nodes(world: World):
    await world.http_node("h1", relay="relay.1")

    unleased = await world.cell.adopt(NodeId("h1"), Holder("relay.2"))
    await world.cell.lease("relay.2")
    held = await world.cell.adopt(NodeId("h1"), Holder("relay.2"))
    await world.age_lease("relay.1")
    owned = await world.cell.adopt(NodeId("h1"), Holder("relay.2"))
    again = await world.cell.adopt(NodeId("h1"), Holder("relay.2"))

    assert isinstance(unleased, HeldBy) and unleased.holder == ""
    assert isinstance(held, HeldBy) and held.holder == "relay.1"
    assert isinstance(owned, Owned) and owned == again


async def test_the_registration_lock_is_one_at_a_time_with_tokens_that_grow(world: World):
    first = await world.cell.lock_node(N1, 5_000)
    busy = await world.cell.lock_node(N1, 5_000)
    assert isinstance(first, LockTaken)
    await world.cell.unlock_node(N1, first.epoch + 1)
    still = await world.cell.lock_node(N1, 5_000)
    await world.cell.unlock_node(N1, first.epoch)
    second = await world.cell.lock_node(N1, 5_000)

    assert isinstance(busy, LockBusy) and isinstance(still, LockBusy) and busy.retry_after_ms > 0
    assert isinstance(second, LockTaken) and second.epoch > first.epoch


async def test_a_silent_node_is_counted_until_it_is_removed_with_all_its_keys(world: World):
    await world.node()
    await world.link.send("DEL", world.cell.keys.node_alive(N1))
    held = await world.cell.remove_node(N1)
    counted = await world.cell.nodes()
    await world.link.send("ZADD", world.cell.keys.nodes_known, 1000, N1)

    removed = await world.cell.remove_node(N1)

    assert (held.status, removed.status) == ("held", "applied")
    assert [view.alive for view in counted] == [False]
    left = await world.link.send("KEYS", "*n1*")
    assert left == []
    assert await world.link.send("EXISTS", world.cell.keys.model(MODEL)) == 0


async def test_a_node_with_reservations_is_not_removed(world: World):
    await world.node()
    await world.start()
    await world.link.send("ZADD", world.cell.keys.nodes_known, 1000, N1)

    assert (await world.cell.remove_node(N1)).status == "held"


async def test_applied_events_are_acked_and_deleted(world: World):
    await world.node()
    await world.publish(HttpBeat(NodeId("nobody")))

    assert await world.link.send("XLEN", world.cell.keys.nodes) == 0


async def test_an_allowance_is_a_minutes_worth_at_once_and_then_a_steady_trickle(world: World):
    waits = [await world.cell.rate("1.2.3.4", 3) for _ in range(4)]

    assert waits[:3] == [0, 0, 0]
    assert 15_000 < waits[3] <= 20_000
    assert await world.cell.rate("5.6.7.8", 3) == 0
    assert 0 < await world.link.send("PTTL", world.cell.keys.rate("1.2.3.4")) <= 120_000
