"""What a job leaves in the books, and how long a refused caller is told to wait."""

from bus.ids import NodeId
from tests.protocol.world import MODEL, World

N1 = NodeId("n1")


async def usage(world: World, address: str = "me") -> dict[str, int]:
    flat = await world.link.send("HGETALL", world.cell.keys.usage(address))
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    return {name.decode(): int(value) for name, value in pairs}


async def test_tokens_of_a_job_that_its_deadline_ends_are_accounted(world: World):
    """A client who always lets his jobs run into their deadline must not compute for nothing."""
    await world.node()
    one = await world.start(stream=True, address="me")
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])
    await world.age_deadline(one.job_id)

    await world.sweep()

    (end,) = await world.ends()
    record = await world.cell.job(one.job_id)
    assert (end.state, end.new_tokens) == ("failed", 3)
    assert record is not None and record.new_tokens == 3
    assert await usage(world) == {"jobs": 1, "new_tokens": 3}


async def test_tokens_of_a_dead_letter_are_accounted(world: World):
    await world.node()
    one = await world.start(address="me")
    await world.flush(one, 0, b"ab", 0, [1, 2])
    for _ in range(3):
        await world.cell.requeue(one.job_id, one.fence, "crash")
        await world.dispatch()
        one = next(iter(await world.read("n1")), one)

    assert await usage(world) == {"jobs": 1, "new_tokens": 2}


async def test_a_refused_caller_waits_by_the_living_nodes_however_many_died(world: World):
    now = (await world.cell.look()).now_ms
    await world.node("live", capacity=1)
    await world.link.send("HSET", world.cell.keys.node(NodeId("live")), "done_rate", "100", "done_ms", now)
    dead = [word for at in range(70) for word in (now - 100_000 - at, f"dead{at}")]
    await world.link.send("ZADD", world.cell.keys.model(MODEL), *dead)
    world.cell.settings = world.cell.settings.changed(queue_max=20)
    for _ in range(20):
        await world.submit()

    refused = await world.refused()

    assert (refused.code, refused.retry_after_ms) == ("queue_full", 1000)


async def test_a_hundred_nodes_drain_faster_than_the_64_that_are_asked(world: World):
    now = (await world.cell.look()).now_ms
    for at in range(128):
        await world.link.send("HSET", world.cell.keys.node(NodeId(f"n{at}")), "done_rate", "0.01", "done_ms", now)
        await world.link.send("ZADD", world.cell.keys.model(MODEL), now, f"n{at}")
    world.cell.settings = world.cell.settings.changed(queue_max=50)
    for _ in range(50):
        await world.submit()

    refused = await world.refused()

    assert 3_800 < refused.retry_after_ms < 4_200  # 5 jobs at 1.28 a second


async def test_the_record_of_a_job_driven_again_expires_before_the_job(world: World):
    """Its own deadline counts, not that of a new job: a record must not name a job that is gone."""
    at = (await world.cell.look()).now_ms + 60_000
    submission = world.submission(
        "i1", tenant="t", idem_key="k", body_digest="d", deadline_in_ms=1_800_000, redrive=True, deadline_at_ms=at
    )

    await world.cell.submit(submission)

    record_ms = await world.link.send("PTTL", world.cell.keys.idem("t", "k"))
    job_ms = await world.link.send("PTTL", world.cell.keys.job(submission.job_id))
    assert 3_050_000 < record_ms <= 3_060_000 < job_ms


async def test_a_job_made_after_its_twin_was_refused_has_its_record(world: World):
    """Two requests with one key: one is refused and takes away the record that the other has read."""
    named = {"tenant": "t", "idem_key": "k", "body_digest": "d"}
    twin = world.submission("i1", **named)
    record = await world.cell._fix_id(twin)
    await world.refused("i1", **named)
    await world.node()

    late = await world.cell._enter(twin, record)
    third = await world.cell.submit(world.submission("i2", **named))

    assert not isinstance(late, bytes) and late.job_id == twin.job_id  # type: ignore[union-attr]  # accepted
    assert (third.job_id, third.existing) == (twin.job_id, True)  # type: ignore[union-attr]  # accepted
    assert 0 < await world.link.send("PTTL", world.cell.keys.idem("t", "k")) <= 3_600_000


async def test_a_key_that_has_come_to_name_another_job_leads_to_that_one(world: World):
    named = {"tenant": "t", "idem_key": "k", "body_digest": "d"}
    twin = world.submission("i1", **named)
    record = await world.cell._fix_id(twin)
    await world.refused("i1", **named)
    await world.node()
    other = await world.submit("i2", **named)

    late = await world.cell._enter(twin, record)
    again = await world.cell.submit(twin)

    assert late == f"{other} d".encode()
    assert again.job_id == other and not await world.cell.job(twin.job_id)  # type: ignore[union-attr]  # accepted
