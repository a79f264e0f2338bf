"""Megabytes of stored log probabilities are checked in parts, between which a process does its other work."""

import asyncio

import pytest
from msgspec.structs import replace

from bus.calls.caller import Caller, CallOptions
from bus.calls.following import Following
from bus.calls.handle import JobHandle
from bus.codec.entries import Assignment
from bus.codec.logprobs import PART_BYTES, Candidate, TokenLogprobs, encode_record
from bus.codec.wire import Accepted, FinishPiece, FlushPiece, Submission
from bus.ids import JobId
from bus.jobs import ChatJob
from tests.caller.stage import Stage, chat, text_of
from tests.conftest import wait_until

COUNT = 1_500
TEXT = b"a" * COUNT
ONE = Candidate(b"a", -0.5)
TOKENS = [TokenLogprobs(at, ONE, (Candidate(b"likely", -0.25),) * 20) for at in range(COUNT)]
LOG = b"".join(map(encode_record, TOKENS))
assert len(LOG) > 5 * PART_BYTES


class Turns:
    """How long a job's log is, at each turn of the event loop: the loop had a turn at each of these lengths."""

    def __init__(self, caller: Caller, job_id: JobId) -> None:
        self._seen: list[int] = [0]
        self._following: Following | None = None
        self._task = asyncio.create_task(self._look(caller, job_id))

    async def _look(self, caller: Caller, job_id: JobId) -> None:
        while True:
            call = caller._calls.get(job_id)
            self._following = self._following or (None if call is None else call.following)
            if self._following is not None and self._following.logprobs is not None:
                self._seen.append(len(self._following.logprobs.raw))
            await asyncio.sleep(0)

    async def steps(self) -> list[int]:
        """Bytes that were taken between two turns."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._task.cancel()
        return [after - before for before, after in zip(self._seen, self._seen[1:], strict=False) if after != before]


def asking(*, stream: bool) -> ChatJob:
    return replace(chat(stream=stream), logprobs=20)


async def finish(stage: Stage, work: Assignment) -> None:
    end = FinishPiece(work.job_id, work.fence, work.route, 0, TEXT, "stop", 3, COUNT, logprobs_offset=0, logprobs=LOG)
    await stage.cell.finish(stage.holder, stage.node, [end])


def are_bounded(steps: list[int]) -> bool:
    return sum(steps) == len(LOG) and min(steps) > 0 and max(steps) <= PART_BYTES


def found(handle: JobHandle) -> bool:
    return [one.chosen for one in handle.logprobs() or ()] == [ONE] * COUNT


async def test_of_an_answer_that_its_end_does_not_carry(caller: Caller, stage: Stage) -> None:
    handle = await caller.submit(asking(stream=False))
    turns = Turns(caller, handle.job_id)

    await finish(stage, await stage.give(handle.job_id))
    text, ended = await handle.result()

    assert (text, ended.state) == (TEXT, "done")
    assert found(handle) and are_bounded(await turns.steps())


@pytest.mark.parametrize("stream", [True, False])
async def test_of_an_answer_that_ended_before_it_was_asked_for(
    caller: Caller, other: Caller, stage: Stage, stream: bool
) -> None:
    options = CallOptions(policy="keep", idem_key="k", body_digest="d")
    first = await caller.submit(asking(stream=False), options)
    await finish(stage, await stage.give(first.job_id))
    await first.result()
    turns = Turns(other, first.job_id)

    late = await other.submit(asking(stream=stream), options)
    text, ended = await late.result()

    assert (late.job_id, text, ended.state) == (first.job_id, TEXT, "done")
    assert found(late) and are_bounded(await turns.steps())


async def test_of_a_plain_producers_job_that_is_looked_at(caller: Caller, stage: Stage) -> None:
    job_id = JobId("c0-plain")
    accepted = await stage.cell.submit(Submission(job_id, asking(stream=True), out="reply:r"))
    assert isinstance(accepted, Accepted)
    work = await stage.give(job_id)
    piece = FlushPiece(job_id, work.fence, work.route, 0, TEXT, 0, b"", 0, LOG)
    await stage.cell.flush(stage.holder, stage.node, [piece])
    turns = Turns(caller, job_id)

    handle = await caller.attach(job_id)
    await wait_until(lambda: found(handle))

    assert are_bounded(await turns.steps())
    await stage.end(work, COUNT)
    assert (await text_of(handle))[0] == TEXT.decode()


async def test_what_is_no_record_in_a_later_part_ends_the_answer() -> None:
    job = Following(streamed=True, scored=True)
    job.marker("1.a", 0)

    turns = list(job.take_in_parts(0, LOG + b"\xff" * 30))

    assert len(turns) > 5
    assert job.ended is not None and job.ended.reason == "interrupted"


async def test_a_new_attempt_between_two_parts_is_not_given_the_old_ones() -> None:
    job = Following(streamed=True, scored=True)
    job.marker("1.a", 0)
    parts = job.take_in_parts(0, LOG)
    next(parts)

    job.marker("2.b", 0)

    assert list(parts) == []
    assert job.logprobs is not None and not job.logprobs.raw
