"""The front door: plain producers add entries to `jobs`; each is admitted or rejected once."""

import msgspec

from bus.codec.entries import End
from bus.codec.wire import Accepted, Refused, Submission
from bus.ids import JobId
from bus.settings import Settings
from tests.protocol.world import World, chat, make_world


async def knock(world: World, own_id: str = "p1") -> tuple[str, Submission]:
    entry = await world.link.send("XADD", world.cell.keys.jobs, "*", "job", b"{}", "id", own_id)
    return entry.decode(), Submission(JobId(f"c0-{own_id}"), chat(), out=f"reply:{own_id}")


async def test_an_entry_becomes_a_job_once(world: World):
    await world.node()
    entry, submission = await knock(world)

    first = await world.cell.admit(entry, submission)
    again = await world.cell.admit(entry, submission)

    assert isinstance(first, Accepted) and again is None
    assert await world.link.send("XLEN", world.cell.keys.jobs) == 0
    assert await world.state(submission.job_id) == "queued"


async def test_the_result_goes_to_the_reply_stream_which_expires(world: World):
    await world.node()
    entry, submission = await knock(world)
    await world.cell.admit(entry, submission)
    await world.dispatch()
    (one,) = await world.read("n1")

    await world.finish(one, 0, b"hello")

    (end,) = await world.ends(out="reply:p1")
    assert (end.state, end.text) == ("done", b"hello")
    assert 0 < await world.link.send("PTTL", world.cell.keys.reply("p1")) <= 120_000


async def test_a_second_entry_with_the_same_id_is_told_of_the_first(world: World):
    await world.node()
    for _ in range(2):
        entry, submission = await knock(world)
        await world.cell.admit(entry, submission)

    (end,) = await world.ends(out="reply:p1")
    assert (end.state, end.reason, end.error_code) == ("duplicate", "queued", "duplicate")


async def test_a_refused_entry_is_answered_and_dead_lettered(world: World):
    entry, submission = await knock(world)

    answer = await world.cell.admit(entry, submission)

    (end,) = await world.ends(out="reply:p1")
    assert isinstance(answer, Refused) and answer.code == "no_model"
    assert (end.state, end.error_code) == ("failed", "no_model")
    assert end.error_message == answer.reason == "no node serves the model m"
    assert [letter["reason"] for letter in await world.dead()] == [b"no_model: no node serves the model m"]
    assert await world.link.send("XLEN", world.cell.keys.jobs) == 0


async def test_above_its_bound_each_entry_is_answered_full(world: World):
    tight = await make_world(world.link, settings=Settings(front_door_max=1))
    await tight.node()
    entries = [await knock(tight, f"p{number}") for number in range(3)]

    answers = [await tight.cell.admit(entry, submission) for entry, submission in entries]

    assert [getattr(answer, "code", "ok") for answer in answers] == ["full", "full", "ok"]
    (end,) = await tight.ends(out="reply:p0")
    assert end.error_code == "full" and end.retry_after_ms > 0


async def test_an_entry_that_is_no_job_is_rejected_once_with_the_reason(world: World):
    entry, submission = await knock(world)
    args = (entry, "bad_request", "field messages is missing", "reply:p1", submission.job_id, {"job": b"\xff{"})

    first = await world.cell.reject(*args)
    again = await world.cell.reject(*args)

    assert (first, again) == (True, False)
    out = await world.out("reply:p1")
    assert [type(one) for one in out] == [End] and out[0].error_message == "field messages is missing"  # type: ignore[union-attr]
    (letter,) = await world.dead()
    assert letter["source"] == b"jobs" and b"messages" in letter["reason"]


async def test_a_reply_key_of_another_type_is_no_reason_to_stop(world: World):
    await world.node()
    await world.link.send("SET", world.cell.keys.reply("p1"), "foreign")
    entry, submission = await knock(world)

    answer = await world.cell.admit(entry, submission)

    assert isinstance(answer, Refused) and answer.code == "bad_reply"
    assert await world.link.send("GET", world.cell.keys.reply("p1")) == b"foreign"


async def test_dead_letters_are_put_away_once_from_any_stream(world: World):
    keys = world.cell.keys
    await world.group(keys.jobs, "dispatcher")
    entry = await world.link.send("XADD", keys.jobs, "*", "what", b"\x00\xff")

    for _ in range(2):
        await world.cell.dead_letter(keys.jobs, entry.decode(), "nonsense", {"what": b"\x00\xff"}, group="dispatcher")

    assert [letter["reason"] for letter in await world.dead()] == [b"nonsense"]
    assert await world.link.send("XLEN", keys.jobs) == 0


async def test_every_refusal_tells_the_producer_the_sentence_that_the_log_has(world: World):
    """A code alone sends the producer to the operator; the sentence says what is missing."""
    tight = await make_world(world.link, settings=Settings(queue_max=1))
    await tight.node(capacity=1)
    await tight.submit("waits")
    full_entry, full = await knock(tight, "full")
    await tight.node("parts", models=("other",), whole=False, layers=(0, 1), layer_count=4)
    parts_entry, parts = await knock(tight, "parts")
    parts = msgspec.structs.replace(parts, job=chat(model="other"))

    refusals = [await tight.cell.admit(full_entry, full), await tight.cell.admit(parts_entry, parts)]

    told = [(await tight.ends(out=f"reply:{name}"))[0].error_message for name in ("full", "parts")]
    assert told == [getattr(one, "reason", "") for one in refusals]
    assert told[0] == "1 jobs are waiting for m"
    assert told[1].endswith("of its 4 layers these are uncovered: 2-3")


async def test_a_malformed_second_entry_is_no_end_of_the_job_with_its_id(world: World):
    """Exactly one terminal: `failed` beside the running job's own end would be a second."""
    await world.node()
    entry, submission = await knock(world)
    await world.cell.admit(entry, submission)
    again, _ = await knock(world)

    await world.cell.reject(again, "invalid_json", "not JSON", "reply:p1", submission.job_id, {"job": b"{oops"})
    await world.dispatch()
    (one,) = await world.read("n1")
    await world.finish(one)

    second, own = await world.ends(out="reply:p1")
    assert (second.state, second.reason) == ("duplicate", "queued")
    assert "not JSON" in second.error_message
    assert own.state == "done"
    assert [letter["reason"] for letter in await world.dead()] == [b"invalid_json: not JSON"]
