"""Records on their way to the server: with their tokens, in slices, never lost and never ahead."""

import pytest

from bus.codec.logprobs import Candidate, TokenLogprobs, encode_record, encode_restart, shown_records
from bus.codec.wire import Finished, Gap, Route, Stored
from bus.ids import Fence, JobId
from gpu_worker import answer_log
from gpu_worker.answer_log import AnswerLog
from gpu_worker.engine import End, Piece
from gpu_worker.publisher import SLICE_BYTES_MAX, Call, Held, Publisher, Slice

WIDE = tuple(Candidate(b"x" * 40, -1.0 - n) for n in range(20))
STOPPED = End("stop")


def held(log: AnswerLog | None, *, text: bytes = b"", tokens: tuple[int, ...] = ()) -> Held:
    return Held(
        JobId("c0-a"), Fence("1.x"), route=Route(out="gateway:g1"), forced_text=text, forced_tokens=tokens, log=log
    )


def record(at: int, word: bytes = b"w") -> bytes:
    return encode_record(TokenLogprobs(at, Candidate(word, -0.5), WIDE))


def say(job: Held, count: int, end: End | None = None) -> Piece:
    """Words of four bytes, each one token."""
    text, start = b"abc " * count, len(job.text)
    records = b"".join(record(start + 4 * n) for n in range(count))
    return Piece(job.sequence, start, text, len(job.tokens), (7,) * count, end, records)


def holding(job: Held) -> Publisher:
    publisher = Publisher(flush_s=0.0, keep_s=15.0)
    publisher.hold(job)
    return publisher


def only(calls: list[Call]) -> Slice:
    [call] = calls
    [part] = call.slices
    return part


def test_a_job_that_does_not_ask_sends_none_whatever_its_engine_says() -> None:
    job = held(None)
    publisher = holding(job)

    publisher.add(say(job, 3), 1.0)

    assert only(publisher.take(1.0)).logprobs is None


def test_records_go_with_their_tokens_and_a_finish_brings_the_last() -> None:
    job = held(AnswerLog())
    publisher = holding(job)
    publisher.add(say(job, 2), 1.0)
    first = publisher.take(1.0)
    publisher.answered(first[0], [Stored(0, 0)], 1.0)

    publisher.add(say(job, 1, STOPPED), 2.0)
    [last] = publisher.take(2.0)

    assert only(first).logprobs == record(0) + record(4)
    assert last.is_finish
    assert only([last]).logprobs == record(8)
    assert only([last]).log_from == len(record(0)) * 2


def test_a_long_log_goes_in_slices_that_keep_tokens_and_text_behind_their_records() -> None:
    job = held(AnswerLog())
    publisher = holding(job)
    count = 3 * SLICE_BYTES_MAX // len(record(0))
    publisher.add(say(job, count, STOPPED), 1.0)
    log, text, tokens = b"", b"", 0
    for _ in range(10):
        [call] = publisher.take(1.0)
        part = only([call])
        assert part.logprobs is not None
        assert len(part.logprobs) <= SLICE_BYTES_MAX
        log, text, tokens = log + part.logprobs, text + part.text, part.token_to
        done = len(log) // len(record(0))
        assert tokens == done
        assert len(text) == 4 * done
        publisher.answered(call, [Finished("done") if call.is_finish else Stored(0, 0)], 1.0)
        if call.is_finish:
            break

    assert len(shown_records(log, len(text))) == count == tokens


def test_what_the_server_lost_goes_again() -> None:
    job = held(AnswerLog())
    publisher = holding(job)
    publisher.add(say(job, 4), 1.0)
    [call] = publisher.take(1.0)
    half = 2 * len(record(0))

    publisher.answered(call, [Gap(8, 2, half)], 1.0)
    part = only(publisher.take(2.0))

    assert (part.text_from, part.token_from, part.log_from) == (8, 2, half)
    assert part.logprobs == record(8) + record(12)


def test_a_later_attempt_goes_on_behind_what_is_stored() -> None:
    """Its log begins there; a server that has less than an earlier attempt stored holds another attempt's."""
    job = held(AnswerLog(500), text=b"abc ", tokens=(7,))
    publisher = holding(job)
    publisher.add(say(job, 1), 1.0)
    [call] = publisher.take(1.0)

    assert (only([call]).log_from, only([call]).logprobs) == (500, record(4))
    _, stopped = publisher.answered(call, [Gap(4, 1, 400)], 1.0)
    assert stopped == [job]


def test_an_answer_with_too_many_is_noticed_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "ANSWER_BYTES_MAX", 3 * len(record(0)))
    log = AnswerLog()

    seen = []
    for records in (record(0) + record(4), record(8) + record(12), record(16)):
        log.append(records)
        seen.append((log.full, log.size // len(record(0))))

    assert seen == [(False, 2), (True, 2), (True, 2)]


def test_a_restart_voids_what_never_had_a_text() -> None:
    """Two tokens were held back when the first engine died; another one goes on from the text."""
    log = record(0) + record(4, b"held") + record(6, b"back") + encode_restart(4) + record(4, b"new") + record(7, b"er")

    assert [one.chosen.token for one in shown_records(log, 9)] == [b"w", b"new", b"er"]
