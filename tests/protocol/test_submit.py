"""submit: a job comes in once, or is refused with the reason and an honest wait."""

from bus.codec.events import NodeBeat
from bus.codec.wire import Accepted, Refused
from bus.ids import Holder, JobId, NodeId
from bus.jobs import decode_job
from bus.keys import queue_name
from bus.settings import Settings
from tests.protocol.world import MODEL, World, chat, make_world


async def test_a_submitted_job_waits_in_its_queue_and_wakes_the_dispatchers(world: World):
    await world.node()

    job_id = await world.submit()

    view = await world.cell.look()
    wakes = await world.link.send("XREVRANGE", world.cell.keys.wake, "+", "-", "COUNT", 1)
    assert [head.job_id for head in view.queues[0].heads] == [job_id]
    assert wakes[0][1][:4] == [b"queue", b"m:1", b"job", job_id.encode()]


async def test_the_same_id_again_is_the_same_job(world: World):
    """A caller whose reply was lost submits again; there must be one entry and one place in the quota."""
    await world.node()
    submission = world.submission("twice", key_id="k", quota_max=5)

    first = await world.cell.submit(submission)
    again = await world.cell.submit(submission)

    assert isinstance(first, Accepted) and isinstance(again, Accepted)
    assert (first.existing, again.existing) == (False, True)
    assert again.deadline_ms == first.deadline_ms
    assert await world.link.send("XLEN", world.cell.keys.queue(queue_name(MODEL, 1))) == 1
    assert await world.link.send("ZCARD", world.cell.keys.quota("k")) == 1


async def test_the_seed_is_fixed_at_submit(world: World):
    """Every attempt must draw alike, also when the caller gave no seed."""
    await world.node()
    own = await world.submit(seed=7)
    drawn = await world.submit()

    records = [await world.cell.job(own), await world.cell.job(drawn)]

    assert records[0] is not None and records[0].seed == 7
    assert records[1] is not None and records[1].seed > 0


async def test_a_model_that_nobody_serves_is_refused_by_name(world: World):
    await world.node()

    refused = await world.refused(job=chat(model="other"))

    assert refused.code == "no_model"
    assert "other" in refused.reason


async def test_a_model_whose_nodes_are_all_silent_is_refused(world: World):
    await world.node()
    await world.link.send("ZADD", world.cell.keys.model(MODEL), 1000, "n1")

    refused = await world.refused()

    assert (refused.code, refused.retry_after_ms > 0) == ("no_node", True)


async def test_a_model_of_which_only_parts_are_served_is_refused_with_the_missing_layers(world: World):
    beat = NodeBeat(NodeId("p"), 5, Holder("p.5"), "torch", (MODEL,), 1, whole=False, layers=(2, 3, 6), layer_count=8)
    await world.publish(beat)

    refused = await world.refused()

    assert refused.code == "uncovered"
    assert "0-1, 4-5, 7" in refused.reason


async def test_a_full_queue_refuses_with_a_wait_from_the_drain_rate(world: World):
    small = await make_world(world.link, settings=Settings(queue_max=2))
    await small.node()
    await small.link.send("HSET", small.cell.keys.node(NodeId("n1")), "done_rate", "0.05", "done_ms", "99999999999999")
    await small.submit()
    await small.submit()

    refused = await small.refused()

    assert refused.code == "queue_full"
    assert 1000 <= refused.retry_after_ms <= 60_000


async def test_a_key_with_all_its_places_taken_is_refused_until_one_of_its_jobs_ends(world: World):
    await world.node()
    one = await world.start(key_id="k", quota_max=1)

    refused = await world.refused(key_id="k", quota_max=1)
    await world.finish(one)
    accepted = await world.submit(key_id="k", quota_max=1)

    assert refused.code == "quota_full"
    assert accepted


async def test_a_refused_submit_leaves_nothing_behind_but_the_report(world: World):
    before = await world.dump()

    await world.refused("x", idem_key="i", body_digest="d", key_id="k", quota_max=3, address="a")

    after = await world.dump()
    assert set(after) - set(before) == {world.cell.keys.events.encode()}


async def test_an_idempotency_key_names_one_job_whatever_id_comes_with_it(world: World):
    await world.node()
    first = await world.cell.submit(world.submission("a", tenant="t", idem_key="i", body_digest="d"))
    again = await world.cell.submit(world.submission("b", tenant="t", idem_key="i", body_digest="d"))

    assert isinstance(first, Accepted) and isinstance(again, Accepted)
    assert again.existing and again.job_id == first.job_id


async def test_an_idempotency_key_with_another_body_is_a_conflict(world: World):
    await world.node()
    await world.submit("a", tenant="t", idem_key="i", body_digest="d")

    refused = await world.refused("b", tenant="t", idem_key="i", body_digest="other")

    assert refused.code == "idem_conflict"


async def test_a_job_with_an_idempotency_record_outlives_it(world: World):
    """Otherwise a late retry would find the record, not the job, and run it a second time."""
    await world.node()
    one = await world.start(tenant="t", idem_key="i", body_digest="d")

    await world.finish(one)

    record_ms = await world.link.send("PTTL", world.cell.keys.idem("t", "i"))
    assert await world.link.send("PTTL", world.cell.keys.job(one.job_id)) > record_ms > 0
    assert await world.link.send("PTTL", world.cell.keys.text(one.job_id, one.fence)) > record_ms


async def test_a_redrive_is_never_refused_and_goes_on_above_the_attempts_seen(world: World):
    """The server lost its last second; the job was admitted once, and part of its answer was shown."""
    tight = await make_world(world.link, settings=Settings(queue_max=1))
    submission = tight.submission(
        "lost", redrive=True, attempt_floor=3, shown_text=b"shown", deadline_at_ms=9_000_000_000_000, stream=True
    )

    answer = await tight.cell.submit(submission)
    await tight.node()
    await tight.dispatch()
    (one,) = await tight.read("n1")

    assert isinstance(answer, Accepted)
    assert answer.deadline_ms == 9_000_000_000_000
    assert one.fence.startswith("4.")
    assert (one.text_len, one.token_len) == (5, 0)
    assert await tight.cell.text(one.job_id, one.fence) == b"shown"


async def test_a_large_payload_has_a_key_of_its_own_and_goes_with_the_end(world: World):
    await world.node()
    job = chat("x" * 20_000)

    one = await world.start(job=job)
    raw = await world.cell.payload(one.job_id)
    await world.finish(one)

    assert one.payload == b""
    assert raw is not None and decode_job(raw) == job
    assert await world.cell.payload(one.job_id) is None
    assert not await world.link.send("EXISTS", world.cell.keys.payload(one.job_id))


async def test_at_maxmemory_a_submit_is_refused_while_running_work_drains(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.link.send("CONFIG", "SET", "maxmemory", "1")
    try:
        refused = await world.refused()
        stored = await world.flush(one, 0, b"a")
        finished = await world.finish(one, 1, b"b")
    finally:
        await world.link.send("CONFIG", "SET", "maxmemory", "0")

    assert refused.code == "memory_full"
    assert await world.state(one.job_id) == "done"
    assert (type(stored).__name__, type(finished).__name__) == ("Stored", "Finished")


async def test_a_reply_stream_of_another_type_is_refused(world: World):
    await world.node()
    await world.link.send("SET", world.cell.keys.reply("mine"), "foreign")

    refused = await world.refused(out="reply:mine", gateway="")

    assert refused.code == "bad_reply"


async def test_unknown_jobs_are_unknown(world: World):
    assert await world.cell.job(JobId("c0-none")) is None
    assert not isinstance(await world.cell.cancel(JobId("c0-none"), "me"), Refused)


async def test_a_queue_that_held_foreign_entries_first_is_listed_with_its_first_job(world: World):
    """A look at everything reads listed queues: elsewhere a job would wait for its deadline, once its wake is gone."""
    await world.node()
    await world.link.send("XADD", world.cell.keys.queue(queue_name("m", 1)), "*", "hello", "world")

    job_id = await world.submit()

    (view,) = (await world.cell.look()).queues
    assert [head.job_id for head in view.heads] == [job_id]
