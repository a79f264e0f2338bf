"""Who reads too slowly is cut off, by one rule for all streams: how much gathers while what was there goes out."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from bus.calls.call import Call
from bus.calls.following import Ended, Following, Records
from bus.calls.handle import JobHandle
from bus.codec.logprobs import Candidate, TokenLogprobs, encode_record
from bus.ids import JobId
from gateway.chats import Course
from gateway.openai_wire import Answer
from gateway.streaming import Events, TooSlow, _pump

LAG_MAX = 4_096
WORD = b"mill "


class Job:
    """Its text grows by words, each a token with its log probability where they are asked for."""

    def __init__(self, *, scored: bool) -> None:
        self.following = Following(streamed=True, scored=scored)
        self.following.marker("1.a", 0)
        self.call = Call(JobId("c0-j"), self.following, None, 0.0, 1e9)
        self.handle = JobHandle(self.call, 0)

    def say(self, words: int) -> None:
        log, at = self.following.logprobs, len(self.following.text)
        records = None
        if log is not None:
            tokens = [TokenLogprobs(at + n * len(WORD), Candidate(WORD, -0.5)) for n in range(words)]
            records = Records(len(log.raw), b"".join(map(encode_record, tokens)))
        self.following.frame("1.a", at, WORD * words, records)
        self.call.wake()

    def end(self) -> None:
        log = self.following.logprobs
        size = 0 if log is None else len(log.raw)
        self.following.end("1.a", len(self.following.text), Ended(state="done", reason="stop"), None, size)
        self.call.wake()


class Client:
    """What its socket takes; `on_write` happens while it takes a piece."""

    def __init__(self, on_write: Callable[[int], None]) -> None:
        self.written = 0
        self.pieces = 0
        self._on_write = on_write

    async def write(self, piece: bytes | bytearray) -> None:
        self.pieces += 1
        self.written += len(piece)
        self._on_write(self.pieces)
        await asyncio.sleep(0)


async def pump(job: Job, client: Client) -> None:
    response: Any = client
    events = Events(Answer("chat", job.handle.job_id, "m", 0), include_usage=False)
    async with asyncio.timeout(5):
        await _pump(response, job.handle, events, Course(), None, 1.0, LAG_MAX)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("words", "cut"), [(LAG_MAX // len(WORD), False), (LAG_MAX // len(WORD) + 1, True)])
async def test_what_gathers_while_a_piece_goes_out_is_bounded(scored: bool, words: int, cut: bool) -> None:
    job = Job(scored=scored)
    job.say(1)

    def on_write(piece: int) -> None:
        if piece == 2:
            job.say(words)
        elif piece == 3:
            job.end()

    if cut:
        with pytest.raises(TooSlow):
            await pump(job, Client(on_write))
    else:
        await pump(job, Client(on_write))
        assert job.handle.position == len(WORD) * (words + 1)


@pytest.mark.parametrize("scored", [False, True])
async def test_much_text_that_was_there_already_is_nobodys_fault(scored: bool) -> None:
    """It came while the client waited, or before it resumed; it goes out in as many writes as it takes."""
    job = Job(scored=scored)
    job.say(10 * LAG_MAX // len(WORD))
    client = Client(lambda piece: job.end() if piece == 2 else None)

    await pump(job, client)

    assert client.written > 10 * LAG_MAX


async def test_a_little_at_each_of_many_writes_adds_up() -> None:
    """With log probabilities what was there goes out in many writes: none of them alone would be too slow."""
    job = Job(scored=True)
    job.say(10 * LAG_MAX // len(WORD))
    client = Client(lambda piece: job.say(100))

    with pytest.raises(TooSlow):
        await pump(job, client)

    assert client.pieces < 20
