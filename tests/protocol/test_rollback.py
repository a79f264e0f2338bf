"""A server that lost its last second (AOF everysec, failover): an older copy of all keys comes back.

What the others remember is then newer than the truth. Fences, routes and re-drives must bring both together again.
"""

from bus.codec.wire import Accepted, Finished, Moved, Stop, Stored
from bus.ids import GatewayId, NodeId
from tests.protocol.world import World

N1 = NodeId("n1")


async def test_a_lost_finish_is_repeated_when_renew_says_that_the_job_still_runs(world: World):
    await world.node()
    one = await world.start()
    before = await world.dump()
    await world.finish(one, 0, b"answer")
    await world.restore(before)

    renewed = await world.cell.renew(N1, one.owner, [])
    again = await world.finish(one, 0, b"answer")

    assert renewed.others == (f"{one.job_id}/{one.fence}",)
    assert again == Finished("done")
    assert [end.text for end in await world.ends()] == [b"answer"]


async def test_a_lost_submit_is_driven_again_with_what_was_shown(world: World):
    await world.node()
    before = await world.dump()
    one = await world.start("n1", "mine", stream=True)
    await world.flush(one, 0, b"shown", 0, [1])
    await world.restore(before)

    zombie = await world.flush(one, 5, b" more", 1, [2])
    answer = await world.cell.submit(
        world.submission(
            "mine", stream=True, redrive=True, attempt_floor=1, shown_text=b"shown", deadline_at_ms=9 * 10**12
        )
    )
    await world.dispatch()
    (two,) = await world.read("n1")

    assert zombie == Stop("unknown")
    assert isinstance(answer, Accepted) and not answer.existing
    assert (two.text_len, two.fence.split(".")[0]) == (5, "2")
    assert await world.finish(two, 5, b" more") == Finished("done")
    assert await world.cell.text(two.job_id, two.fence) == b"shown more"


async def test_a_lost_assignment_is_made_again_under_another_nonce(world: World):
    """The attempt number is handed out twice; only the nonce tells the two apart."""
    await world.node("a")
    await world.node("b")
    job_id = await world.submit(stream=True)
    before = await world.dump()
    await world.dispatch("a")
    (lost,) = await world.read("a")
    await world.restore(before)
    queued = await world.flush(lost, 0, b"zombie", 0, [1])
    await world.dispatch("b")
    (one,) = await world.read("b")

    fenced = await world.flush(lost, 0, b"zombie", 0, [1])

    assert (queued, fenced) == (Stop("queued"), Stop("fence"))
    assert lost.fence.split(".")[0] == one.fence.split(".")[0]
    assert await world.finish(one, 0, b"real") == Finished("done")
    assert (await world.cell.job(job_id)).text_len == 4  # type: ignore[union-attr]


async def test_a_lost_requeue_leaves_the_older_attempt_running_and_the_newer_stops(world: World):
    await world.node("a")
    await world.node("b")
    one = await world.start("a", stream=True)
    before = await world.dump()
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("b")
    (two,) = await world.read("b")
    await world.restore(before)

    assert await world.flush(two, 0, b"new", 0, [1]) == Stop("fence")
    assert await world.flush(one, 0, b"old", 0, [1]) == Stored(3, 1)


async def test_lost_text_is_sent_again_from_what_is_stored(world: World):
    await world.node()
    one = await world.start(stream=True)
    await world.flush(one, 0, b"ab", 0, [1])
    before = await world.dump()
    await world.flush(one, 2, b"cd", 1, [2])
    await world.restore(before)

    gap = await world.flush(one, 4, b"ef", 2, [3])
    await world.flush(one, 2, b"cdef", 1, [2, 3])

    assert (gap.text_len, gap.token_len) == (2, 1)  # type: ignore[union-attr]
    assert await world.cell.text(one.job_id, one.fence) == b"abcdef"
    assert await world.cell.tokens(one.job_id, one.fence) == (1, 2, 3)


async def test_a_lost_take_over_sends_the_stream_back_to_the_gateway_the_server_knows(world: World):
    await world.node()
    one = await world.start(stream=True)
    before = await world.dump()
    await world.cell.attach(one.job_id, GatewayId("g2"), "gateway:g2")
    moved = await world.flush(one, 0, b"ab")
    await world.restore(before)

    assert isinstance(moved, Moved)
    assert await world.flush(one, 0, b"ab") == Stored(2, 0)


async def test_a_lost_ownership_comes_back_with_the_next_beat(world: World):
    old = await world.node()
    await world.age_lease(old)
    before = await world.dump()
    await world.node()
    await world.restore(before)

    status = await world.beat("n1")

    view = await world.cell.node(N1)
    assert status == "applied"
    assert view is not None and view.owner == world.holders[N1] != old


async def test_after_a_flush_of_everything_the_next_beat_brings_the_node_back_and_the_job_is_driven_again(world: World):
    await world.node()
    one = await world.start("n1", "mine")
    await world.link.send("FLUSHALL")
    stopped = await world.cell.renew(N1, one.owner, [(one.job_id, one.fence)])
    await world.beat("n1")

    await world.submit("mine", redrive=True, attempt_floor=1)
    await world.group(world.cell.keys.node_jobs(N1), "workers")
    await world.dispatch()
    (two,) = await world.read("n1")

    assert list(stopped.stop.values()) == ["unknown"]
    assert await world.finish(two) == Finished("done")
