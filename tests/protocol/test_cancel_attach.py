"""cancel and attach: who may end a job, who follows it, and what the others hear."""

import msgspec

from bus.codec.entries import Detached, parse_control
from bus.codec.wire import Attached, Cancelling, Ended, Finished, JobRecord, NotYours, Unknown, WrongGateway
from bus.ids import GatewayId, JobId, NodeId
from tests.protocol.world import GATEWAY, World

G2 = GatewayId("g2")


async def controls(world: World, node: str = "n1") -> list[tuple[str, str]]:
    entries = await world.link.send("XRANGE", world.cell.keys.node_control(NodeId(node)), "-", "+")
    parsed = [parse_control({flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}) for _, flat in entries]
    return [(one.type, one.job_id) for one in parsed]


async def test_a_queued_job_is_cancelled_at_once(world: World):
    await world.node()
    job_id = await world.submit(key_id="k", quota_max=1)

    reply = await world.cell.cancel(job_id, "me")

    assert reply == Ended(job_id, "cancelled")
    assert [end.state for end in await world.ends()] == ["cancelled"]
    assert (await world.cell.look()).queues[0].heads == ()
    assert await world.link.send("ZCARD", world.cell.keys.quota("k")) == 0


async def test_a_held_back_job_is_cancelled_at_once(world: World):
    await world.node()
    one = await world.start()
    await world.cell.requeue(one.job_id, one.fence, "node_error")

    reply = await world.cell.cancel(one.job_id, "me")

    assert reply == Ended(one.job_id, "cancelled")
    assert await world.link.send("ZCARD", world.cell.keys.late) == 0


async def test_a_running_job_holds_its_slot_until_its_worker_ends_it_as_cancelled_whatever_it_says(world: World):
    await world.node()
    one = await world.start()

    reply = await world.cell.cancel(one.job_id, "me")
    held = await world.running()
    renewed = await world.cell.renew(NodeId("n1"), one.owner, [(one.job_id, one.fence)])
    finished = await world.finish(one, 0, b"too late")

    assert reply == Cancelling(one.job_id)
    assert held == [f"{one.job_id}/{one.fence}"] == list(renewed.cancel)
    assert await controls(world) == [("cancel", one.job_id)]
    assert finished == Finished("cancelled")
    assert [end.state for end in await world.ends()] == ["cancelled"]


async def test_a_job_that_has_ended_stays_as_it_is(world: World):
    await world.node()
    one = await world.start()
    await world.finish(one)

    reply = await world.cell.cancel(one.job_id, "me")

    assert reply == Ended(one.job_id, "done", earlier=True)
    assert len(await world.ends()) == 1


async def test_a_gone_client_cancels_nothing_that_has_moved_to_another_gateway(world: World):
    await world.node()
    one = await world.start()
    await world.cell.attach(one.job_id, G2, "gateway:g2")

    refused = await world.cell.cancel(one.job_id, "client gone", only_gateway=GATEWAY)
    accepted = await world.cell.cancel(one.job_id, "client gone", only_gateway=G2)

    assert refused == WrongGateway(one.job_id, "g2")
    assert accepted == Cancelling(one.job_id)


async def test_cancelling_an_unknown_job_says_so(world: World):
    assert await world.cell.cancel(JobId("c0-none"), "me") == NotYours(JobId("c0-none"), "unknown")


async def test_attach_takes_the_stream_over_and_tells_the_old_gateway(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"abc")

    reply = await world.cell.attach(one.job_id, G2, "gateway:g2")

    assert isinstance(reply, Attached)
    assert (reply.state, reply.fence, reply.text_len) == ("running", one.fence, 3)
    assert await world.cell.text(one.job_id, reply.fence, 1, 3) == b"bc"
    assert (await world.out())[-1] == Detached(one.job_id, "g2")
    (marker,) = await world.markers("gateway:g2")
    assert (marker.fence, marker.text_len) == (one.fence, 3)
    sets = [await world.link.send("SMEMBERS", world.cell.keys.gateway_jobs(g)) for g in (GATEWAY, G2)]
    assert [len(one) for one in sets] == [0, 1]


async def test_a_job_whose_first_caller_wanted_the_whole_streams_to_the_one_who_attaches(world: World):
    await world.node()
    one = await world.start(tenant="t", idem_key="i", body_digest="d")
    before = await world.cell.job(one.job_id)
    reply = await world.cell.attach(one.job_id, G2, "gateway:g2")
    after = await world.cell.job(one.job_id)
    assert isinstance(reply, Attached) and before is not None and after is not None

    await world.finish(msgspec.structs.replace(one, route=after.route), 0, b"text")

    assert (before.stream, after.stream) == (False, True)
    assert (after.model, after.seed, after.deadline_ms) == (before.model, before.seed, before.deadline_ms)
    assert [frame.text for frame in await world.frames("gateway:g2")] == [b"text"]
    assert len(await world.ends(out="gateway:g2")) == 1


async def test_attach_keeps_whom_the_job_is_accounted_to(world: World):
    await world.node()
    job_id = await world.submit(address="me", key_id="k", quota_max=3)

    await world.cell.attach(job_id, G2, "gateway:g2")

    record = await world.cell.job(job_id)
    assert record is not None
    assert (record.route.address, record.route.key_id, record.route.gateway) == ("me", "k", "g2")


async def test_attaching_twice_detaches_nobody_twice(world: World):
    await world.node()
    one = await world.start(stream=True)

    first = await world.cell.attach(one.job_id, G2, "gateway:g2")
    again = await world.cell.attach(one.job_id, G2, "gateway:g2")

    assert first == again
    assert sum(isinstance(entry, Detached) for entry in await world.out()) == 1
    assert sum(isinstance(entry, Detached) for entry in await world.out("gateway:g2")) == 0


async def test_attaching_to_a_job_that_has_ended_gives_its_record(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.finish(one, 0, b"all of it")

    reply = await world.cell.attach(one.job_id, G2, "gateway:g2")

    assert isinstance(reply, JobRecord) and reply.ended
    assert await world.cell.text(one.job_id, reply.fence) == b"all of it"
    assert await world.out("gateway:g2") == []


async def test_attaching_to_an_unknown_job_says_so(world: World):
    assert await world.cell.attach(JobId("c0-none"), G2, "gateway:g2") == Unknown(JobId("c0-none"))
