"""What is due for one job, decided without a server."""

import pytest

from bus.calls.call import Call, Where, after_loss, must_attach, next_step, patience_s, where_of
from bus.calls.following import Ended, Following
from bus.calls.handle import JobHandle
from bus.codec.wire import Policy, Route, Submission
from bus.ids import GatewayId, JobId
from tests.caller.stage import chat

US = GatewayId("us")
SILENCE_S, GRACE_S = 10.0, 2.0


def call(where: Where = "here", *, streamed: bool = True, held: bool = True, policy: Policy = "cancel") -> Call:
    """A job last heard of at 0, to be ended by us at 600."""
    submission = Submission(job_id=JobId("c0-j"), job=chat(), out="gateway:us", gateway=US, policy=policy)
    made = Call(JobId("c0-j"), Following(streamed=streamed), submission if held else None, 0.0, 600.0)
    made.where = where
    return made


def step(made: Call, now: float) -> str:
    return next_step(made, now, silence_s=SILENCE_S, grace_s=GRACE_S)


@pytest.mark.parametrize(
    ("where", "quiet_s", "due_s"),
    [("here", 9.9, 10.0), ("elsewhere", 0.9, 1.0), ("stored", 0.1, 0.2)],
)
def test_a_silent_job_is_asked_for_the_sooner_the_less_we_hear_of_it(where: Where, quiet_s: float, due_s: float):
    assert step(call(where), quiet_s) == "nothing"
    assert step(call(where), due_s) == "check"


def test_a_job_whose_submit_has_no_answer_yet_is_not_asked_for():
    """Unknown would mean: forgotten, drive it again; but it only is not there yet."""
    assert step(call("asking"), 599.0) == "nothing"


def test_a_job_that_was_missed_is_looked_for_again_soon():
    missed = call("here", held=False)
    missed.missing_at = 0.0

    assert patience_s(missed, SILENCE_S) == 1.0


def test_after_its_deadline_a_job_is_ended_whatever_else_is_due():
    late = call()
    late.cancelled_by = "user"

    assert step(late, 600.0) == "end"


def test_a_cancel_that_did_not_get_through_is_tried_again_after_a_grace_not_at_every_look():
    cancelled = call()
    cancelled.cancelled_by = "user"
    assert step(cancelled, 5.0) == "cancel"

    cancelled.tried_at = 5.0

    assert step(cancelled, 5.3) == "nothing"
    assert step(cancelled, 7.0) == "cancel"


@pytest.mark.parametrize(
    ("where", "policy", "due"),
    [
        ("here", "cancel", "cancel"),
        ("asking", "cancel", "cancel"),
        ("here", "keep", "forget"),
        ("elsewhere", "cancel", "forget"),  # whoever has its stream decides
        ("stored", "cancel", "forget"),  # the producer still waits
    ],
)
def test_a_job_that_nobody_here_waits_for_is_cancelled_only_where_it_is_ours(where: Where, policy: Policy, due: str):
    left = call(where, policy=policy)
    JobHandle(left, 0)
    left.closing_at = 1.0

    assert step(left, 2.9) != due
    assert step(left, 3.0) == due


def test_whoever_has_the_stream_and_the_request_drives_a_lost_job_again_at_once():
    assert after_loss(call("here"), 0.0, wait_s=13) == "redrive"


@pytest.mark.parametrize(("held", "last"), [(True, "redrive"), (False, "give up")])
def test_all_others_give_him_time_first(held: bool, last: str):
    follower = call("elsewhere", held=held)
    follower.missing_at = 0.0

    assert after_loss(follower, 12.9, wait_s=13) == "wait"
    assert after_loss(follower, 13.0, wait_s=13) == last


def test_a_stream_is_brought_here_unless_it_is_here_or_belongs_to_a_plain_producer():
    assert not must_attach(call("here"))
    assert not must_attach(call("stored"))
    assert must_attach(call("here", streamed=False))
    assert must_attach(call("elsewhere"))


def test_a_stream_that_has_ended_is_not_brought_anywhere():
    over = call("elsewhere")
    over.following.ended = Ended(state="done", reason="stop")

    assert not must_attach(over)


def test_a_stream_whose_end_waits_for_its_last_text_is_not_brought_anywhere():
    nearly = call("elsewhere")
    nearly.following.end("1.a", 5, Ended(state="done", reason="stop"), None)

    assert not must_attach(nearly)


def test_the_route_says_where_news_of_a_job_comes():
    assert where_of(Route(out="gateway:us", gateway=US), US) == "here"
    assert where_of(Route(out="gateway:them", gateway=GatewayId("them")), US) == "elsewhere"
    assert where_of(Route(out="reply:mine"), US) == "stored"
