"""What a worker tells the server and when: decided without a clock or a server."""

import random

import pytest

from bus.codec.wire import Finished, FlushReply, Gap, Moved, Route, Stop, Stored
from bus.ids import Fence, JobId
from gpu_worker.engine import End, Piece
from gpu_worker.publisher import SLICE_BYTES_MAX, Call, EngineFault, Held, Publisher

ROUTE = Route(out="gateway:g1")
STORED = Stored(0, 0)  # the lengths in a Stored are not needed: what was sent is known
DONE = Finished("done")


def held(name: str = "a", *, text: bytes = b"", tokens: tuple[int, ...] = (), keeps_tokens: bool = True) -> Held:
    return Held(
        JobId(f"c0-{name}"),
        Fence("1.x"),
        route=ROUTE,
        forced_text=text,
        forced_tokens=tokens,
        keeps_tokens=keeps_tokens,
    )


def piece(of: Held, text: bytes, *, end: End | None = None, tokens: tuple[int, ...] | None = None) -> Piece:
    ids = (7,) * len(text.split()) if tokens is None else tokens
    return Piece(of.sequence, len(of.text), text, len(of.tokens), ids, end)


def publisher(*, flush_s: float = 0.03, keep_s: float = 15.0) -> Publisher:
    return Publisher(flush_s=flush_s, keep_s=keep_s)


def holding(*jobs: Held) -> Publisher:
    one = publisher()
    for job in jobs:
        one.hold(job)
    return one


def sent(calls: list[Call]) -> list[tuple[str, str, int, bytes]]:
    return [
        ("finish" if call.is_finish else "flush", part.held.job_id, part.text_from, part.text)
        for call in calls
        for part in call.slices
    ]


STOPPED = End("stop", prompt_tokens=3, new_tokens=2)


def test_the_first_token_goes_at_once_and_later_ones_with_the_next_tick():
    job = held()
    one = holding(job)

    one.add(piece(job, b"one"), 1.0)
    assert sent(one.take(1.0)) == [("flush", "c0-a", 0, b"one")]

    one.add(piece(job, b" two"), 1.01)
    assert one.take(1.01) == []
    assert one.due_s() == pytest.approx(1.03)
    assert sent(one.take(1.03)) == [("flush", "c0-a", 3, b" two")]


def test_one_flush_carries_all_sequences_and_one_finish_all_ends():
    a, b, c, d = (held(name) for name in "abcd")
    one = holding(a, b, c, d)
    one.add(piece(a, b"a"), 0.0)
    one.add(piece(b, b"b"), 0.0)
    one.add(piece(c, b"c", end=STOPPED), 0.0)
    one.add(piece(d, b"d", end=STOPPED), 0.0)

    calls = one.take(0.0)

    assert [(call.is_finish, len(call.slices)) for call in calls] == [(False, 2), (True, 2)]


def test_a_finish_carries_the_last_text_so_a_short_job_costs_one_call():
    job = held()
    one = holding(job)
    one.add(piece(job, b"done", end=STOPPED), 0.0)

    [call] = one.take(0.0)

    assert call.is_finish and call.slices[0].text == b"done"


def test_a_job_is_listed_until_its_finish_is_answered_and_then_kept_for_a_while():
    job = held()
    one = holding(job)
    one.add(piece(job, b"x", end=STOPPED), 0.0)
    [call] = one.take(0.0)
    assert one.listed() == [(job.job_id, job.fence)]

    finished, stopped = one.answered(call, [DONE], 0.1)

    assert (finished, stopped, one.listed(), one.kept) == ([job], [], [], 1)
    one.expire(15.0)
    assert one.kept == 1
    one.expire(15.2)
    assert one.kept == 0


def test_at_most_eight_calls_are_unanswered_and_more_pieces_coalesce():
    job = held()
    one = holding(job)
    calls: list[Call] = []
    for step in range(20):
        one.add(piece(job, b"%d" % (step % 10)), step)
        calls += one.take(step)
    assert len(calls) == 8
    assert one.due_s() is None

    one.answered(calls[0], [STORED], 30.0)

    [call] = one.take(30.0)
    assert call.slices[0].text == b"890123456789"


def test_after_a_gap_it_sends_again_from_what_is_stored():
    """The server lost its last second, so it has less than we sent from."""
    job = held()
    one = holding(job)
    one.add(piece(job, b"one two"), 0.0)
    [first] = one.take(0.0)
    one.answered(first, [STORED], 0.1)
    one.add(piece(job, b" three"), 1.0)
    [second] = one.take(1.0)

    one.answered(second, [Gap(3, 1)], 1.1)

    [again] = one.take(1.1)
    assert (again.slices[0].text_from, again.slices[0].text, again.slices[0].token_from) == (3, b" two three", 1)


def test_gaps_answered_to_calls_from_before_a_resend_do_not_send_again():
    """Eight calls may be out when the first gap is heard; each of them will report the same gap."""
    job = held()
    one = holding(job)
    out: list[Call] = []
    for step in range(3):
        one.add(piece(job, b"abc"), step)
        out += one.take(step)
    one.answered(out[0], [Gap(0, 0)], 5.0)
    [again] = one.take(5.0)
    assert again.slices[0].text == b"abcabcabc"

    one.answered(out[1], [Gap(0, 0)], 5.1)
    one.answered(out[2], [Gap(0, 0)], 5.2)

    assert one.take(9.0) == []
    one.answered(again, [STORED], 9.1)
    assert job.stored_text == 9


def test_a_lost_reply_sends_again_from_what_is_known_to_be_stored():
    """Whether the server ran it is unknown; repeats are dropped there, a hole would be for ever."""
    job = held()
    one = holding(job)
    one.add(piece(job, b"one"), 0.0)
    [first] = one.take(0.0)
    one.answered(first, [STORED], 0.1)
    one.add(piece(job, b" two", end=STOPPED), 1.0)
    [finish] = one.take(1.0)

    one.failed(finish, 1.1)

    assert sent(one.take(1.1)) == [("finish", "c0-a", 3, b" two")]
    assert len(one) == 1


def test_after_a_refusal_it_waits_a_moment():
    job = held()
    one = holding(job)
    one.add(piece(job, b"one"), 0.0)
    [first] = one.take(0.0)

    one.failed(first, 1.0, pause=True)

    assert one.take(1.0) == []
    due_s = one.due_s()
    assert due_s is not None and 1.0 < due_s <= 1.5
    assert len(one.take(due_s)) == 1


def test_a_job_that_is_not_ours_any_more_is_dropped_without_a_word():
    job, other = held("a"), held("b")
    one = holding(job, other)
    for each in (job, other):
        one.add(piece(each, b"x"), 0.0)
    [call] = one.take(0.0)

    finished, stopped = one.answered(call, [Stop("fence"), STORED], 0.1)

    assert (finished, stopped) == ([], [job])
    assert one.listed() == [(other.job_id, other.fence)]
    assert one.add(Piece(job.sequence, 1, b"y", 1, (1,)), 0.2) is None
    assert one.take(9.0) == []


def test_a_moved_job_is_sent_again_on_its_new_route():
    job = held()
    one = holding(job)
    one.add(piece(job, b"x", end=STOPPED), 0.0)
    [call] = one.take(0.0)
    route = Route(out="gateway:g2")

    one.answered(call, [Moved(route)], 0.1)

    [again] = one.take(0.1)
    assert again.slices[0].held.route == route and again.slices[0].text == b"x"


def test_kept_finishes_are_repeated_for_a_server_that_lost_them():
    job = held()
    one = holding(job)
    one.add(piece(job, b"one two", end=STOPPED), 0.0)
    [call] = one.take(0.0)
    one.answered(call, [DONE], 0.1)

    assert one.repeat_kept() == 1
    [again] = one.take(1.0)
    one.answered(again, [Gap(4, 1)], 1.1)
    [whole] = one.take(1.1)
    finished, _ = one.answered(whole, [DONE], 1.2)

    assert again.is_finish and again.slices[0].text == b""
    assert whole.is_finish and whole.slices[0].text == b"two"
    assert finished == []  # it was reported the first time
    assert one.take(9.0) == []


def test_a_finish_is_repeated_when_told_that_its_job_still_runs():
    job = held()
    one = holding(job)
    one.add(piece(job, b"x", end=STOPPED), 0.0)
    [call] = one.take(0.0)
    one.answered(call, [DONE], 0.1)

    assert one.repeat_finish(job.sequence)
    assert not one.repeat_finish("c0-unknown/1.x")
    assert len(one.take(0.2)) == 1


def test_forced_progress_is_not_sent_again():
    job = held(text=b"one two", tokens=(7, 7))
    one = holding(job)
    one.add(piece(job, b" three"), 0.0)

    [call] = one.take(0.0)

    part = call.slices[0]
    assert (part.text_from, part.text, part.token_from, part.tokens) == (7, b" three", 2, b"\x07\0\0\0")


def test_no_token_ids_are_sent_for_an_attempt_that_works_from_text():
    """Once dropped, ids stay dropped: the server would see a hole before them."""
    job = held(text=b"one", keeps_tokens=False)
    one = holding(job)
    one.add(Piece(job.sequence, 3, b" two", 1, (7,)), 0.0)

    part = one.take(0.0)[0].slices[0]

    assert (part.text, part.token_from, part.tokens) == (b" two", 0, b"")


def test_a_huge_text_is_cut_between_characters_and_finished_with_its_last_part():
    job = held()
    one = holding(job)
    text = "é".encode() * SLICE_BYTES_MAX  # twice the limit, two bytes each
    one.add(piece(job, b"a" + text, end=STOPPED, tokens=(1,)), 0.0)

    parts: list[tuple[bool, bytes]] = []
    while calls := one.take(0.0):
        parts += [(call.is_finish, part.text) for call in calls for part in call.slices]

    assert b"".join(text for _, text in parts) == b"a" + text
    assert all(part.decode() for _, part in parts)
    assert [is_finish for is_finish, _ in parts] == [False, False, True]


def test_a_piece_that_does_not_continue_its_text_is_the_engines_fault():
    job = held()
    one = holding(job)

    with pytest.raises(EngineFault):
        one.add(Piece(job.sequence, 5, b"x", 0, ()), 0.0)

    assert one.take(9.0) == []


class ForgetfulServer:
    """Stores texts as the scripts do, but loses replies, its latest appends, and moves jobs, by chance."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.texts: dict[str, bytes] = {}
        self.ended: set[str] = set()

    def run(self, call: Call) -> list[FlushReply | Finished]:
        return [self._fold(call, index) for index in range(len(call.slices))]

    def _fold(self, call: Call, index: int) -> FlushReply | Finished:
        part = call.slices[index]
        name = part.held.job_id
        stored = self.texts.get(name, b"")
        if name in self.ended:
            return DONE if call.is_finish else Stop("done")
        if self.chance.random() < 0.1:
            stored = self.texts[name] = stored[: self.chance.randrange(len(stored) + 1)]
        if part.text_from > len(stored):
            return Gap(len(stored), 0)
        self.texts[name] = stored + part.text[len(stored) - part.text_from :]
        if call.is_finish:
            self.ended.add(name)
            return DONE
        return Stored(len(self.texts[name]), 0)


@pytest.mark.parametrize("seed", range(30))
def test_every_text_arrives_whole_whatever_is_lost(seed: int):
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = ForgetfulServer(chance)
    jobs = [held(str(number)) for number in range(5)]
    one = holding(*jobs)
    said = {job.job_id: b"" for job in jobs}
    out: list[Call] = []
    now_s = 0.0
    while len(one):
        now_s += chance.random() * 0.05
        assert now_s < 500, "does not come to an end"
        job = chance.choice(jobs)
        if job.end is None:
            text = bytes(chance.choices(b"abcdef", k=chance.randrange(9)))
            said[job.job_id] += text
            one.add(piece(job, text, end=STOPPED if chance.random() < 0.1 else None), now_s)
        out += one.take(now_s)
        assert len(out) <= 9 and one.unanswered == len(out)
        while out and chance.random() < 0.4:
            call = out.pop(0)
            lost = chance.random()
            if lost < 0.1:
                one.failed(call, now_s, pause=chance.random() < 0.5)  # never arrived
                continue
            answers = server.run(call)
            if lost < 0.3:
                one.failed(call, now_s)  # ran, and its reply was lost
            else:
                one.answered(call, answers, now_s)

    assert server.texts == said
    assert server.ended == set(said)
