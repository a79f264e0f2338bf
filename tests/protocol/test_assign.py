"""assign: verify and reserve. The order of nodes is the dispatcher's, whether one may have the job is decided here."""

from bus.codec.wire import Assigned, NotAssigned, Pick, new_nonce
from bus.ids import GatewayId, JobId, NodeId
from bus.keys import queue_name
from tests.protocol.world import MODEL, World

QUEUE = queue_name(MODEL, 1)


def pick(job_id: JobId, entry_id: str, *nodes: str, fence: str = "0.0", out: str = "gateway:g1") -> Pick:
    return Pick(entry_id, job_id, fence, out, tuple(map(NodeId, nodes)), new_nonce())  # type: ignore[arg-type]


async def test_the_first_node_that_can_take_the_job_gets_it(world: World):
    await world.node("a", capacity=1)
    await world.node("b", capacity=1)
    await world.submit()
    await world.submit()
    await world.submit()

    replies = await world.dispatch("b", "a")

    assert [getattr(reply, "node", "-") for reply in replies] == ["b", "a", "-"]
    assert isinstance(replies[2], NotAssigned) and replies[2].why == "no_room"
    assert len(await world.running("a")) == len(await world.running("b")) == 1


async def test_an_assigned_job_is_in_the_nodes_stream_and_no_longer_in_the_queue(world: World):
    holder = await world.node()
    job_id = await world.submit(stream=True, address="me", key_id="k")

    (reply,) = await world.dispatch()

    assert isinstance(reply, Assigned)
    (one,) = await world.read("n1")
    assert (one.job_id, one.fence, one.owner, one.stream) == (job_id, reply.fence, holder, True)
    assert (one.route.address, one.route.key_id, one.route.gateway) == ("me", "k", "g1")
    assert await world.link.send("XLEN", world.cell.keys.queue(QUEUE)) == 0
    (marker,) = await world.markers()
    assert (marker.fence, marker.node, marker.text_len) == (reply.fence, "n1", 0)
    record = await world.cell.job(job_id)
    assert record is not None and (record.state, record.node, record.score) == ("running", "n1", b'{"wait":1}')


async def test_promised_tokens_are_the_sum_over_the_reservations(world: World):
    await world.node(capacity=5)
    await world.submit(est_prompt=10, est_new=100)
    await world.submit(est_prompt=5, est_new=50)
    await world.dispatch()
    full = await world.cell.node(NodeId("n1"))
    one, other = await world.read("n1")
    await world.finish(one)
    half = await world.cell.node(NodeId("n1"))
    await world.finish(other)
    empty = await world.cell.node(NodeId("n1"))

    views = [(v.running, v.promised_prompt, v.promised_new) for v in (full, half, empty) if v]
    assert views == [(2, 15, 150), (1, 5, 50), (0, 0, 0)]


async def test_a_node_that_does_not_beat_or_has_no_lease_or_drains_gets_nothing(world: World):
    for name in ("silent", "lapsed", "draining", "starting"):
        await world.node(name)
    await world.link.send("DEL", world.cell.keys.node_alive(NodeId("silent")))
    await world.age_lease(world.holders[NodeId("lapsed")])
    await world.cell.drain_node(NodeId("draining"), world.holders[NodeId("draining")])
    await world.age_lease(world.holders[NodeId("starting")])
    await world.cell.own(NodeId("starting"), "starting")
    await world.submit()

    (reply,) = await world.dispatch("silent", "lapsed", "draining", "starting", "nobody")

    assert isinstance(reply, NotAssigned) and reply.why == "no_room"


async def test_a_node_of_another_model_gets_nothing(world: World):
    await world.node("a")
    await world.node("b", models=["other"])
    await world.submit()

    (reply,) = await world.dispatch("b")

    assert isinstance(reply, NotAssigned)


async def test_stale_entries_are_deleted_on_the_way(world: World):
    """Another dispatcher was faster, or the job is gone: a wrong guess is harmless."""
    await world.node()
    job_id = await world.submit()
    entry = (await world.cell.look()).queues[0].heads[0].entry_id
    await world.dispatch()
    copy = await world.link.send("XADD", world.cell.keys.queue(QUEUE), "*", "job", job_id)

    replies = await world.cell.assign(
        QUEUE, [pick(job_id, entry, "n1"), pick(job_id, copy.decode(), "n1"), pick(JobId("c0-gone"), "1-1", "n1")]
    )

    assert [reply.why for reply in replies if isinstance(reply, NotAssigned)] == ["not_queued", "not_queued", "gone"]
    assert len(await world.running()) == 1
    assert await world.link.send("XLEN", world.cell.keys.queue(QUEUE)) == 0


async def test_one_job_twice_in_a_call_is_assigned_once(world: World):
    await world.node(capacity=5)
    job_id = await world.submit()
    entry = (await world.cell.look()).queues[0].heads[0].entry_id

    replies = await world.cell.assign(QUEUE, [pick(job_id, entry, "n1"), pick(job_id, entry, "n1")])

    assert [type(reply) for reply in replies] == [Assigned, NotAssigned]
    assert len(await world.running()) == 1


async def test_more_than_64_picks_are_cut_in_calls(world: World):
    await world.node(capacity=100)
    for _ in range(70):
        await world.submit()
    heads = (await world.cell.look(heads=100)).queues[0].heads

    replies = await world.cell.assign(QUEUE, [pick(h.job_id, h.entry_id, "n1") for h in heads])

    assert sum(isinstance(reply, Assigned) for reply in replies) == 70


async def test_a_job_past_its_deadline_is_left_to_the_sweep(world: World):
    await world.node()
    job_id = await world.submit()
    await world.age_deadline(job_id)

    (reply,) = await world.dispatch()

    assert isinstance(reply, NotAssigned) and reply.why == "deadline"


async def test_a_queued_job_whose_stream_was_taken_over_is_assigned_to_the_new_one(world: World):
    """The queue entry still names the old out-stream; the answer of the script names the new one."""
    await world.node()
    job_id = await world.submit(stream=True)
    await world.cell.lease("g2")
    await world.cell.attach(job_id, GatewayId("g2"), "gateway:g2")

    (reply,) = await world.dispatch()

    assert isinstance(reply, Assigned)
    assert [marker.job_id for marker in await world.markers("gateway:g2")] == [job_id]


async def test_an_avoided_node_is_passed_over_only_while_another_lives(world: World):
    await world.node("a")
    await world.node("b", capacity=1)
    one = await world.start("a")
    await world.start("b")  # the other node is full: the job waits for it all the same
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.link.send("HSET", world.cell.keys.node(NodeId("a")), "breaker_n", 0, "breaker_until", 0)
    await world.age_late()
    await world.end_grace()
    await world.sweep()

    (waits,) = await world.dispatch("a", "b")
    await world.age_lease(world.holders[NodeId("b")])
    (reply,) = await world.dispatch("a", "b")

    assert isinstance(waits, NotAssigned) and waits.why == "no_room"
    assert isinstance(reply, Assigned) and reply.node == "a"


async def test_a_resumed_job_takes_its_tokens_to_a_node_of_the_same_digest(world: World):
    await world.node("a", resume="d1")
    await world.node("b", resume="d1")
    one = await world.start("a", stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])
    await world.cell.requeue(one.job_id, one.fence, "drain")
    (head,) = (await world.cell.look()).queues[0].heads

    await world.dispatch("b")
    (two,) = await world.read("b")

    assert head.resume == "d1"
    assert (two.text_len, two.token_len) == (3, 3)
    assert await world.cell.text(two.job_id, two.fence) == b"abc"
    assert await world.cell.tokens(two.job_id, two.fence) == (1, 2, 3)
    assert (await world.markers())[-1].text_len == 3


async def test_tokens_are_dropped_for_good_on_a_node_of_another_digest(world: World):
    """Later attempts work from the text, also on a node that could have used the tokens."""
    await world.node("a", resume="d1")
    await world.node("b", resume="d2")
    one = await world.start("a", stream=True)
    await world.flush(one, 0, b"abc", 0, [1, 2, 3])
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("b")
    (two,) = await world.read("b")
    stored = await world.flush(two, 3, b"de", 77, [9, 9])
    await world.cell.requeue(two.job_id, two.fence, "drain")
    await world.dispatch("a")
    (three,) = await world.read("a")

    assert (two.text_len, two.token_len) == (3, 0)
    assert (stored.text_len, stored.token_len) == (5, 0)  # type: ignore[union-attr]
    assert (three.text_len, three.token_len) == (5, 0)
    assert await world.cell.tokens(three.job_id, three.fence) == ()


async def test_a_job_without_any_text_yet_starts_afresh_anywhere(world: World):
    await world.node("a", resume="")
    await world.node("b", resume="d2")
    one = await world.start("a", stream=True)
    await world.cell.requeue(one.job_id, one.fence, "drain")
    await world.dispatch("b")
    (two,) = await world.read("b")

    stored = await world.flush(two, 0, b"x", 0, [5])

    assert (stored.text_len, stored.token_len) == (1, 1)  # type: ignore[union-attr]


async def test_an_open_breaker_keeps_jobs_away_and_then_lets_one_probe_through(world: World):
    await world.node("a", capacity=4)
    one = await world.start("a")
    await world.cell.requeue(one.job_id, one.fence, "node_error")
    await world.submit()
    await world.submit()

    closed = await world.dispatch("a")
    await world.link.send("HSET", world.cell.keys.node(NodeId("a")), "breaker_until", 1000)
    probing = await world.dispatch("a")
    still = await world.dispatch("a")
    (probe,) = await world.read("a")
    await world.finish(probe)
    after = await world.dispatch("a")

    def assigned(replies: list[Assigned | NotAssigned]) -> int:
        return sum(isinstance(reply, Assigned) for reply in replies)

    assert [assigned(closed), assigned(probing), assigned(still), assigned(after)] == [0, 1, 0, 1]


async def test_a_job_that_crashed_twice_waits_for_a_node_to_run_empty_and_keeps_it(world: World):
    """One poison job must not take its neighbours with it."""
    await world.node("a", capacity=3)
    neighbour = await world.start("a")
    poison = await world.start("a")
    await world.cell.requeue(poison.job_id, poison.fence, "crash")
    await world.dispatch("a")
    (poison,) = await world.read("a")
    requeued = await world.cell.requeue(poison.job_id, poison.fence, "crash")
    late_comer = await world.submit()

    waiting = await world.dispatch("a")
    await world.finish(neighbour)
    alone = await world.dispatch("a")
    kept = await world.dispatch("a")
    (poison,) = [one for one in await world.read("a") if one.job_id == poison.job_id]
    await world.finish(poison)
    freed = await world.dispatch("a")

    assert requeued.alone  # type: ignore[union-attr]
    assert [(r.job_id, r.why) for r in waiting if isinstance(r, NotAssigned)] == [
        (poison.job_id, "alone"),
        (late_comer, "no_room"),
    ]
    assert [r.job_id for r in alone if isinstance(r, Assigned)] == [poison.job_id]
    assert [r.why for r in kept if isinstance(r, NotAssigned)] == ["no_room"]
    assert [r.job_id for r in freed if isinstance(r, Assigned)] == [late_comer]


async def test_the_mark_of_a_waiting_job_lapses(world: World):
    await world.node("a", capacity=3)
    waiting = await world.submit()
    await world.submit()
    key = world.cell.keys.node(NodeId("a"))
    await world.link.send("HSET", key, "alone", waiting, "alone_until", 9_999_999_999_999)

    held = await world.dispatch("a")
    await world.link.send("HSET", key, "alone_until", 1000)
    freed = await world.dispatch("a")

    assert [type(reply) for reply in held] == [NotAssigned, NotAssigned]
    assert [type(reply) for reply in freed] == [Assigned, Assigned]


async def test_foreign_entries_of_a_queue_are_dead_lettered(world: World):
    await world.node()
    await world.link.send("XADD", world.cell.keys.queue(QUEUE), "*", "what", b"\xff\x00")
    job_id = await world.submit()
    await world.link.send("SADD", world.cell.keys.queues, QUEUE)

    view = await world.cell.look()

    assert [head.job_id for head in view.queues[0].heads] == [job_id]
    assert [letter["source"] for letter in await world.dead()] == [b"queue:m:1"]
    assert await world.link.send("XLEN", world.cell.keys.queue(QUEUE)) == 1
