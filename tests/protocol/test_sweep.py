"""The sweep: what time does, by one caller at a time, and not while a whole server or network was away."""

import asyncio

from bus.cell import Cell
from bus.codec.entries import parse_control
from bus.codec.events import NodeBye
from bus.codec.wire import Requeued
from bus.ids import GatewayId, NodeId
from bus.link import Link, ServerAddress
from bus.settings import Settings
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer
from tests.protocol.world import GATEWAY, World

N1 = NodeId("n1")


async def test_an_expired_reservation_of_a_started_job_is_a_crash(world: World):
    await world.node()
    one = await world.start()
    await world.flush(one, 0, b"x")
    await world.end_grace()
    await world.age_reservations()

    report = await world.sweep()

    assert [reply.why for reply in report.requeued] == ["crash"]
    assert await world.state(one.job_id) == "queued"


async def test_an_expired_reservation_that_was_never_read_counts_nothing_and_goes_elsewhere(world: World):
    """A worker that holds its lease but does not read must not get the same job again and again."""
    await world.node("a")
    await world.node("b")
    job_id = await world.submit()
    await world.dispatch("a")
    await world.end_grace()
    await world.age_reservations("a")

    report = await world.sweep()
    await world.dispatch("a", "b")

    record = await world.cell.job(job_id)
    assert [reply.why for reply in report.requeued] == ["unread"]
    assert record is not None and (record.node, record.crashes) == ("b", 0)


async def test_an_expired_reservation_on_a_relays_node_is_a_lost_relay(world: World):
    relay = await world.http_node("h1")
    one = await world.start("h1")
    await world.cell.renew(NodeId("h1"), relay, [(one.job_id, one.fence)])
    await world.end_grace()
    await world.age_reservations("h1")

    report = await world.sweep()

    assert [reply.why for reply in report.requeued] == ["relay_lost"]


async def test_a_reservation_renewed_in_time_is_left_alone(world: World):
    holder = await world.node()
    one = await world.start()
    await world.end_grace()
    await world.age_reservations()
    await world.cell.renew(N1, holder, [(one.job_id, one.fence)])

    report = await world.sweep()

    assert report.requeued == ()


async def test_a_reservation_whose_job_is_gone_gives_its_slot_back(world: World):
    await world.node()
    one = await world.start()
    await world.end_grace()
    await world.link.send("DEL", world.cell.keys.job(one.job_id))
    await world.age_reservations()

    await world.sweep()

    view = await world.cell.node(N1)
    assert view is not None and (view.running, view.promised_new) == (0, 0)


async def test_a_held_back_job_goes_back_when_it_is_due(world: World):
    await world.node()
    one = await world.start()
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    early = await world.sweep()
    await world.age_late()

    late = await world.sweep()

    assert (early.released, late.released) == (0, 1)
    assert [head.job_id for queue in (await world.cell.look()).queues for head in queue.heads] == [one.job_id]


async def test_a_queued_job_fails_at_its_deadline(world: World):
    await world.node()
    job_id = await world.submit()
    await world.age_deadline(job_id)

    report = await world.sweep()

    (end,) = await world.ends()
    assert [one.state for one in report.ended] == ["failed"]
    assert (end.error_code, end.state) == ("deadline_exceeded", "failed")


async def test_a_running_job_fails_at_its_deadline_and_its_worker_is_told(world: World):
    await world.node()
    one = await world.start()
    await world.age_deadline(one.job_id)

    await world.sweep()
    late = await world.finish(one)

    entries = await world.link.send("XRANGE", world.cell.keys.node_control(N1), "-", "+")
    flat = entries[0][1]
    control = parse_control({flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)})
    assert (control.type, control.job_id) == ("cancel", one.job_id)
    assert await world.running() == []
    assert late.state == "failed"  # type: ignore[union-attr]
    assert len(await world.ends()) == 1


async def test_the_deadline_of_a_lost_job_is_forgotten(world: World):
    await world.node()
    job_id = await world.submit()
    await world.age_deadline(job_id)
    await world.link.send("DEL", world.cell.keys.job(job_id))

    await world.sweep()

    assert await world.link.send("ZCARD", world.cell.keys.deadlines) == 0


async def test_jobs_of_a_lapsed_gateway_end_or_go_on_by_their_policy(world: World):
    await world.node(capacity=9)
    queued = await world.submit(policy="cancel")
    kept = await world.submit(policy="keep")
    await world.end_grace()
    await world.cell.drop_lease(GATEWAY)

    await world.sweep()

    assert (await world.state(queued), await world.state(kept)) == ("cancelled", "queued")
    assert not await world.link.send("EXISTS", world.cell.keys.gateway_jobs(GATEWAY))


async def test_a_living_gateway_keeps_its_jobs(world: World):
    await world.node()
    job_id = await world.submit()
    await world.end_grace()

    await world.sweep()

    assert await world.state(job_id) == "queued"


async def test_a_job_that_another_gateway_took_over_outlives_the_first(world: World):
    await world.node()
    job_id = await world.submit()
    await world.cell.lease("g2")
    await world.cell.attach(job_id, GatewayId("g2"), "gateway:g2")
    await world.end_grace()
    await world.cell.drop_lease(GATEWAY)

    await world.sweep()

    assert await world.state(job_id) == "queued"


async def test_a_new_server_run_gives_everybody_one_lease_of_grace(world: World):
    """Nobody could renew while it was away; its first sweep must not take the fleet's work away."""
    await world.node()
    one = await world.start()
    await world.age_reservations()
    await world.cell.drop_lease(GATEWAY)

    report = await world.sweep()

    assert report.grace_until_ms > (await world.cell.look()).now_ms
    assert report.requeued == ()
    assert await world.state(one.job_id) == "running"


async def test_most_workers_lapsing_at_once_arm_the_grace_and_only_once(world: World):
    for name in ("a", "b", "c", "d"):
        await world.node(name)
    await world.end_grace()
    now = (await world.cell.look()).now_ms
    for name in ("a", "b", "c"):
        await world.link.send("ZADD", world.cell.keys.leases, now - 100, world.holders[NodeId(name)])

    armed = await world.sweep()
    again = await world.sweep()

    assert armed.grace_until_ms > now
    assert again.grace_until_ms == armed.grace_until_ms


async def test_two_workers_of_two_are_no_mass(world: World):
    for name in ("a", "b"):
        await world.node(name)
    await world.end_grace()
    now = (await world.cell.look()).now_ms
    for name in ("a", "b"):
        await world.link.send("ZADD", world.cell.keys.leases, now - 100, world.holders[NodeId(name)])

    assert (await world.sweep()).grace_until_ms == 0


async def test_one_sweeps_at_a_time(world: World):
    first = await world.cell.sweep("d1")
    other = await world.cell.sweep("d2")
    again = await world.cell.sweep("d1")

    assert (first.swept, other.swept, again.swept) == (True, False, True)


async def test_a_node_silent_for_too_long_is_removed(world: World):
    await world.node()
    await world.end_grace()
    await world.link.send("ZADD", world.cell.keys.nodes_known, 1000, "n1")

    report = await world.sweep()

    assert (report.removed_nodes, report.departed_nodes) == ((N1,), ())
    assert await world.cell.nodes() == []


async def test_what_a_leaving_node_still_held_is_handed_back(world: World):
    holder = await world.node()
    one = await world.start()
    await world.publish(NodeBye(N1, int(holder.rpartition(".")[2])))
    await world.end_grace()
    await world.age_reservations()

    report = await world.sweep()
    await world.sweep()

    assert isinstance(report.requeued[0], Requeued)
    assert await world.state(one.job_id) == "queued"
    assert await world.cell.node_names() == []


async def test_dead_consumers_go_only_when_nothing_is_pending(world: World):
    await world.node()
    await world.start()
    key = world.cell.keys.node_jobs(N1)
    await world.link.send("XGROUP", "CREATECONSUMER", key, "workers", "n1.old")

    tidied = await world.cell._call("tidy", [key, world.cell.keys.leases], ["workers", -1])

    consumers = await world.link.send("XINFO", "CONSUMERS", key, "workers")
    assert (tidied, len(consumers)) == (1, 1)


async def test_a_sweep_that_waited_for_the_server_to_come_back_still_gives_the_grace(own_server: ValkeyServer) -> None:
    """Called before the restart, sent after it: what it reclaims is decided by the run that executes it."""
    address = ServerAddress.parse(own_server.url)
    async with await Link.connect(address, name="sweep", wait_s=10.0) as link:
        cell = Cell(link, 0, Settings())
        await cell.sweep("dispatcher:1")
        await link.send("DEL", cell.keys.grace, cell.keys.sweep)
        await link.send("SET", cell.keys.grace, f"{link.run_id} 0 0")
        own_server.kill()
        await wait_until(lambda: not link.connected)
        waiting = asyncio.create_task(cell.sweep("dispatcher:1"))
        await asyncio.sleep(0)
        own_server.start()

        report = await asyncio.wait_for(waiting, 10)

    assert report.grace_until_ms > 0


async def test_a_reservation_that_claims_to_last_for_ever_frees_its_slot_unless_its_job_runs_there(world: World):
    """Anybody may ZADD; and a server whose clock went back has written such ones itself."""
    await world.node(capacity=3)
    one = await world.start()
    running = world.cell.keys.node_running(N1)
    member = f"{one.job_id}/{one.fence}"
    await world.link.send("ZADD", running, "+inf", member, "+inf", "c0-ghost/1.aa", 10**15, b"\xff\xfe")
    await world.end_grace()

    await world.sweep()

    assert await world.running() == [member]
    assert await world.state(one.job_id) == "running"
