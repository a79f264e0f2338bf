"""Log probabilities as a waiting process hears them: with their text, once each, whatever breaks in between."""

import random

import pytest
from msgspec.structs import replace

from bus.calls import handle as handle_module
from bus.calls import logprob_log
from bus.calls.caller import Caller, CallOptions
from bus.calls.following import Ended, Following, Records
from bus.calls.handle import Detached, Finished, JobHandle, TextDelta
from bus.calls.logprob_log import LogprobLog
from bus.codec.entries import Assignment
from bus.codec.logprobs import (
    Candidate,
    TokenLogprobs,
    decode_record,
    encode_record,
    encode_restart,
    record_parts,
    record_places,
    shown_records,
)
from bus.codec.wire import FinishPiece, FinishReply, FlushPiece, FlushReply, Moved
from bus.jobs import ChatJob
from tests.caller.stage import Stage, chat, state_is, text_of
from tests.conftest import wait_until

DONE = Ended(state="done", reason="stop")
WORDS = [b"The", b" mill", b" turns", b" the", b" stone", b"."]
TEXT = b"".join(WORDS)
KEEP = CallOptions(policy="keep")


def token(at: int, word: bytes, logprob: float = -0.25) -> TokenLogprobs:
    return TokenLogprobs(at, Candidate(word, logprob), (Candidate(word, logprob), Candidate(b"\xe2", -3.5)))


TOKENS = [token(sum(map(len, WORDS[:n])), word) for n, word in enumerate(WORDS)]
RECORDS = [encode_record(one) for one in TOKENS]


def log(*numbers: int) -> bytes:
    return b"".join(RECORDS[n] for n in numbers)


def words(found: tuple[TokenLogprobs, ...] | None) -> list[bytes]:
    assert found is not None
    return [one.chosen.token for one in found]


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_went() -> None:
    whole = TokenLogprobs(2**32 - 1, Candidate(b"", -0.5, special=True), (Candidate(b"x" * 1024, -9999.0),) * 20)

    assert decode_record(encode_record(whole)) == whole
    assert decode_record(encode_restart(7)) is None


def test_impossible_values_are_brought_within_bounds() -> None:
    record = TokenLogprobs(0, Candidate(b"y" * 3000, float("-inf")), (Candidate(b"", 0.1),) * 30)

    found = decode_record(encode_record(record))

    assert found is not None
    assert (len(found.chosen.token), found.chosen.logprob) == (1024, -9999.0)
    assert len(found.top) == 20 and found.top[0].logprob == 0.0


def test_bytes_that_are_no_records_are_refused_and_nothing_else() -> None:
    """Cut anywhere, or with any byte changed: either still whole, valid records, or a ValueError."""
    chance = random.Random(3)
    raw = log(0, 1, 2)
    ends = {end for _, end in record_places(raw)}
    for cut in range(len(raw)):
        if cut not in ends and cut:
            with pytest.raises(ValueError):
                record_places(raw[:cut])
    for _ in range(3000):
        broken = bytearray(raw)
        broken[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            places = record_places(broken)
        except ValueError:
            continue
        starts = [0, *(end for _, end in places[:-1])]
        for start in starts:
            found = decode_record(broken, start)
            assert found is None or all(-9999 <= one.logprob <= 0 for one in (found.chosen, *found.top))


def test_parts_are_whole_records_and_what_is_none_comes_whole() -> None:
    raw = log(0, 1, 2, 3)
    size = len(RECORDS[0])

    assert list(record_parts(raw, 1)) == RECORDS[:4]
    assert list(record_parts(raw, len(log(2, 3)))) == [log(0, 1), log(2, 3)]
    assert list(record_parts(raw)) == [raw] and list(record_parts(b"")) == []
    for broken in (b"\0" * 30, b"\xff" * 30, raw[: size + 3][size:]):
        assert list(record_parts(log(0) + broken, 1)) in ([log(0), broken], [log(0) + broken])


# --- the log ----------------------------------------------------------------------------------------------------------


def test_holes_are_told_and_repeats_dropped() -> None:
    one = LogprobLog()
    size = len(log(0))

    assert one.take(0, log(0))
    assert not one.take(size + len(log(1)), log(2))
    assert one.take(0, log(0, 1))
    assert words(one.read(0, 0, 100)[0]) == WORDS[:2]


def test_other_records_in_the_place_of_known_ones_count() -> None:
    """A server lost its last second, and an engine whose numbers differ a little went on."""
    one = LogprobLog()
    one.take(0, log(0, 1, 2))
    other = encode_record(token(3, b" mill", -0.75))

    assert one.take(len(log(0)), other)

    assert one.generation == 1
    assert [record.chosen.logprob for record in one.read(0, 0, 100)[0]] == [-0.25, -0.75]


def test_going_on_within_a_record_is_no_log() -> None:
    one = LogprobLog()
    one.take(0, log(0, 1))

    with pytest.raises(ValueError):
        one.take(5, log(2))


def test_more_than_an_answer_may_have_is_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes to a stream: a waiting process keeps it in memory."""
    monkeypatch.setattr(logprob_log, "ANSWER_BYTES_MAX", len(log(0, 1)))
    one = LogprobLog()
    one.take(0, log(0, 1))

    with pytest.raises(ValueError):
        one.take(len(log(0, 1)), log(2))


def test_every_way_to_cut_the_text_gives_each_token_once() -> None:
    """Also where an engine died with two tokens of which nothing was shown yet."""
    raw = log(0, 1, 2, 3) + encode_restart(TOKENS[2].at) + log(2, 3, 4, 5)
    one = LogprobLog()
    one.take(0, raw)
    for cut in range(len(TEXT) + 1):
        first, index = one.read(0, 0, cut)
        second, _ = one.read(index, cut, len(TEXT))
        resumed, _ = one.read(0, cut, len(TEXT))

        assert words((*first, *second)) == WORDS
        assert resumed == second
    assert shown_records(raw, len(TEXT)) == TOKENS


def test_records_of_a_dead_attempt_are_not_read_by_who_goes_on_in_parts() -> None:
    """Half characters that the first engine stored before their text: the second says other tokens from there on."""
    dead, alive = [token(2, b"\xf0"), token(3, b"\x9f")], [token(2, b"A"), token(3, b"B")]
    one = LogprobLog()
    one.take(0, b"".join(map(encode_record, [token(0, b"Hi"), *dead])))
    first, index = one.read(0, 0, 2)

    one.take(len(one.raw), encode_restart(2) + b"".join(map(encode_record, alive)))
    index = index if one.generation == 0 else 0
    second, index = one.read(index, 2, 3)
    third, _ = one.read(index, 3, 4)

    assert (words(first), words(second), words(third)) == ([b"Hi"], [b"A"], [b"B"])
    assert words(one.read(0, 2, 4)[0]) == [b"A", b"B"]


def test_a_restart_that_is_taken_back_gives_its_records_back() -> None:
    one = LogprobLog()
    raw = log(0, 1, 2)
    one.take(0, raw + encode_restart(TOKENS[1].at) + log(1))

    one.take(len(raw), log(3))

    assert words(one.read(0, 0, 100)[0]) == WORDS[:4]


# --- the fold ---------------------------------------------------------------------------------------------------------


def asking(text_len: int = 0) -> Following:
    job = Following(streamed=True, scored=True)
    job.marker("1.a", text_len)
    return job


def test_text_waits_for_the_records_that_belong_to_it() -> None:
    job = asking()

    job.frame("1.a", 0, b"The", Records(len(log(0)), log(1)))
    hole = job.hole()
    assert hole is not None and (hole.start, hole.end, hole.logprobs_from) == (0, 3, 0)
    assert job.filled(hole, b"The", log(0, 1))

    assert bytes(job.text) == b"The"
    assert job.hole() is None


def test_the_end_waits_for_them_too() -> None:
    job = asking()
    job.frame("1.a", 0, b"The", Records(0, log(0)))

    job.end("1.a", 8, DONE, None, len(log(0, 1)))
    hole = job.hole()
    assert job.ended is None and hole is not None
    job.filled(hole, b" mill", b"")
    assert job.ended is None, "the text is whole, the records are not"
    hole = job.hole()
    assert hole is not None and (hole.start, hole.end) == (8, 8)
    assert job.filled(hole, b"", log(1))

    assert job.ended == DONE


def test_what_a_hostile_node_wrote_ends_the_answer() -> None:
    job = asking()

    job.frame("1.a", 0, b"The", Records(0, b"\xff" * 30))

    assert job.ended is not None and job.ended.reason == "interrupted"
    assert job.text == b""


def test_an_attempt_that_begins_anew_has_a_log_of_its_own() -> None:
    job = asking()
    job.frame("1.a", 0, b"", Records(0, log(5)))

    job.marker("2.b", 0)
    job.frame("2.b", 0, b"The", Records(0, log(0)))

    assert job.logprobs is not None
    assert words(job.logprobs.read(0, 0, 3)[0]) == [b"The"]


def test_a_shorter_log_after_a_rollback_is_whole() -> None:
    """The server lost its last second; the next attempt wrote fewer bytes in the place of those that were heard."""
    job = asking()
    job.frame("1.a", 0, b"The", Records(0, log(0)))
    job.frame("1.a", 3, b"", Records(len(log(0)), log(1, 2, 3)))
    job.marker("2.b", 3)
    other = encode_record(token(3, b" mill", -0.75))
    job.frame("2.b", 3, b" mill", Records(len(log(0)), other))

    job.end("2.b", 8, DONE, None, len(log(0)) + len(other))

    assert job.ended == DONE


def test_what_is_read_of_an_attempt_that_was_replaced_meanwhile_counts_no_more() -> None:
    """The old one's log was longer; that of the new one begins anew."""
    job = asking()
    job.frame("1.a", 0, b"", Records(len(log(0)), log(1)))
    hole = job.hole()
    assert hole is not None

    job.marker("2.b", 0)
    assert job.filled(hole, b"", log(0, 1))
    job.frame("2.b", 0, b"The", Records(0, log(0)))
    job.end("2.b", 3, DONE, None, len(log(0)))

    assert job.ended == DONE
    assert job.logprobs is not None and bytes(job.logprobs.raw) == log(0)


# --- over a server ----------------------------------------------------------------------------------------------------


def asking_chat(*, stream: bool = True) -> ChatJob:
    return replace(chat(stream=stream), logprobs=2)


async def say(stage: Stage, work: Assignment, first: int, last: int, *, end: bool = False) -> Assignment:
    """Words first..last of the text with their records, to wherever the stream has moved."""
    at, log_at = TOKENS[first].at, len(log(*range(first)))
    text, records = b"".join(WORDS[first:last]), log(*range(first, last))
    reply: FlushReply | FinishReply
    while True:
        if end:
            ended = FinishPiece(
                work.job_id, work.fence, work.route, at, text, "stop", 3, last, logprobs_offset=log_at, logprobs=records
            )
            [reply] = await stage.cell.finish(stage.holder, stage.node, [ended])
        else:
            piece = FlushPiece(work.job_id, work.fence, work.route, at, text, 0, b"", log_at, records)
            [reply] = await stage.cell.flush(stage.holder, stage.node, [piece])
        if not isinstance(reply, Moved):
            return work
        work = replace(work, route=reply.route)


async def all_of(handle: JobHandle) -> list[TokenLogprobs]:
    found: list[TokenLogprobs] = []
    async for event in handle:
        if isinstance(event, TextDelta):
            assert event.logprobs is not None
            assert all(event.offset <= one.at < event.end for one in event.logprobs)
            found += event.logprobs
        else:
            assert isinstance(event, Finished | Detached)
    return found


async def test_they_come_with_the_text(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(asking_chat())
    work = await stage.give(handle.job_id)
    await say(stage, work, 0, 2)
    await say(stage, work, 2, 6, end=True)

    assert await all_of(handle) == TOKENS
    assert list(handle.logprobs() or ()) == TOKENS


async def test_who_waits_for_the_whole_gets_all(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(asking_chat(stream=False))
    work = await stage.give(handle.job_id)
    await say(stage, work, 0, 3)
    await say(stage, work, 3, 6, end=True)

    text, _ = await handle.result()

    assert text == TEXT
    assert list(handle.logprobs() or ()) == TOKENS


async def test_a_long_answer_comes_in_pieces_between_which_others_go_on(
    caller: Caller, other: Caller, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle_module, "SLICE_RECORDS", 2)
    first = await caller.submit(asking_chat(), KEEP)
    work = await stage.give(first.job_id)
    await say(stage, work, 0, 6, end=True)
    await text_of(first)

    late = await other.attach(first.job_id, 3)
    pieces = [event async for event in late if isinstance(event, TextDelta)]

    assert [words(one.logprobs) for one in pieces] == [WORDS[1:3], WORDS[3:5], WORDS[5:]]
    assert b"".join(one.text for one in pieces) == TEXT[3:]
    assert [list(found) async for found in late.logprob_slices()] == [TOKENS[:2], TOKENS[2:4], TOKENS[4:]]


@pytest.mark.parametrize("offset", [0, 3, 5, len(TEXT)])
async def test_another_process_goes_on_from_any_byte(caller: Caller, other: Caller, stage: Stage, offset: int) -> None:
    first = await caller.submit(asking_chat(), KEEP)
    work = await stage.give(first.job_id)
    await say(stage, work, 0, 4)

    taken = await other.attach(first.job_id, offset)
    await say(stage, work, 4, 6, end=True)

    assert await all_of(taken) == [one for one in TOKENS if one.at >= offset]


async def test_after_the_end_too(caller: Caller, other: Caller, stage: Stage) -> None:
    first = await caller.submit(asking_chat(), KEEP)
    work = await stage.give(first.job_id)
    await say(stage, work, 0, 6, end=True)
    await text_of(first)

    late = await other.attach(first.job_id, 3)

    assert await all_of(late) == TOKENS[1:]


async def test_a_forgotten_job_is_driven_again_with_those_that_were_shown(caller: Caller, stage: Stage) -> None:
    """The server lost everything; another engine goes on from the text."""
    handle = await caller.submit(asking_chat())
    work = await stage.give(handle.job_id)
    await say(stage, work, 0, 3)
    first = await handle.next(5)
    assert isinstance(first, TextDelta)
    await stage.cell.link.send("FLUSHALL")
    await stage.rise()

    await wait_until(lambda: state_is(stage, handle, "queued"))
    again = await stage.give(handle.job_id)
    shown = await stage.cell.logprobs(again.job_id, again.fence)
    restart = encode_restart(TOKENS[3].at)
    piece = FinishPiece(
        again.job_id, again.fence, again.route, TOKENS[3].at, b"".join(WORDS[3:]), "stop", 3, 6,
        logprobs_offset=len(shown), logprobs=restart + log(3, 4, 5),
    )  # fmt: skip
    await stage.cell.finish(stage.holder, stage.node, [piece])

    assert shown == log(0, 1, 2)
    assert [*(first.logprobs or ()), *await all_of(handle)] == TOKENS
