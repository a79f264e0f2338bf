"""Keys of another type, members of no meaning, counts that are full: they cost themselves, never a job or the sweep."""

from bus.ids import JobId, NodeId
from tests.protocol.world import GATEWAY, World

N1 = NodeId("n1")


async def test_a_usage_key_of_another_type_keeps_no_job_from_its_end(world: World):
    """An error in the middle of a script leaves its first writes done: the job would be done and nobody told."""
    await world.node()
    await world.link.send("SET", world.cell.keys.usage("me"), "foreign")
    finished = await world.start(address="me")
    expired = await world.submit(address="me")
    await world.age_deadline(expired)

    await world.finish(finished)
    await world.sweep()

    assert [end.state for end in await world.ends()] == ["done", "failed"]


async def test_a_full_count_keeps_no_job_from_its_end(world: World):
    await world.node()
    await world.link.send("HSET", world.cell.keys.usage("me"), "prompt_tokens", 2**63 - 1)
    one = await world.start(address="me")

    await world.finish(one, prompt_tokens=2)

    assert len(await world.ends(one.job_id)) == 1
    assert await world.link.send("HGET", world.cell.keys.usage("me"), "jobs") == b"1"


async def test_quota_and_gateway_keys_of_another_type_keep_no_job_from_its_life(world: World):
    await world.node()
    await world.link.send("SET", world.cell.keys.quota("k"), "foreign")
    await world.link.send("SET", world.cell.keys.gateway_jobs(GATEWAY), "foreign")

    one = await world.start(key_id="k")
    await world.finish(one)
    cancelled = await world.submit(key_id="k")
    await world.cell.cancel(cancelled, "me")

    assert [end.state for end in await world.ends()] == ["done", "cancelled"]


async def test_what_the_sweep_cannot_handle_is_a_dead_letter_and_keeps_nothing_else_waiting(world: World):
    keys, send = world.cell.keys, world.link.send
    await world.node()
    await world.end_grace()
    late = await world.submit()
    await world.age_deadline(late)
    started = await world.start()
    await world.flush(started, 0, b"x")
    await world.age_reservations()
    for index in (keys.deadlines, keys.late, keys.node_running(N1)):
        await send("ZADD", index, 1, b"\xff\xfe", 2, "c0-bad/1.a" if index == keys.node_running(N1) else "c0-bad")
    await send("HSET", keys.node_load(N1), "c0-bad/1.a", 7)
    await send("SET", keys.job(JobId("c0-bad")), "foreign")
    await send("SET", keys.node_running(NodeId("n2")), "foreign")
    await send("ZADD", keys.nodes_known, 3, "n2")

    report = await world.sweep()

    assert await world.state(late) == "failed"
    assert [one.job_id for one in report.requeued] == [started.job_id]
    assert [await send("ZCARD", key) for key in (keys.late, keys.node_running(N1))] == [0, 0]
    assert await send("EXISTS", keys.node_load(N1)) == 0
    assert {letter["source"] for letter in await world.dead()} >= {b"deadlines", b"late", b"node:n1:running"}
    assert (await world.sweep()).swept


async def test_a_job_hash_of_somebody_else_is_no_job(world: World):
    await world.link.send("HSET", world.cell.keys.job(JobId("c0-x")), "fence", "1.a")
    await world.link.send("ZADD", world.cell.keys.deadlines, 1000, "c0-x")

    await world.sweep()

    assert await world.link.send("ZCARD", world.cell.keys.deadlines) == 0
