"""Queues are shared by rendezvous; a queue whose head waits too long belongs to anyone."""

from hypothesis import given
from hypothesis import strategies as st

from bus.codec.wire import NO_FENCE, QueuedJob, QueueView
from bus.ids import JobId
from bus.keys import queue_name
from dispatcher.sharing import Share

QUEUES = [queue_name(f"model-{index}", priority) for index in range(40) for priority in (0, 1)]


def owned(me: str, holders: list[str]) -> set[str]:
    share = Share(me, holders)
    return {queue for queue in QUEUES if share.owns(queue)}


def test_every_queue_has_exactly_one_owner_among_the_live_dispatchers() -> None:
    members = ["dispatcher:1", "dispatcher:2", "dispatcher:3"]
    shares = [owned(me, members) for me in members]

    assert sorted(queue for share in shares for queue in share) == sorted(QUEUES)
    assert all(shares)


def test_the_queues_of_one_model_have_the_same_owner() -> None:
    """Two owners would plan the same nodes twice."""
    mine = owned("dispatcher:1", ["dispatcher:2"])

    assert {queue.rpartition(":")[0] + ":0" for queue in mine} <= mine


def test_a_dispatcher_alone_or_unlisted_serves_everything_it_may_own() -> None:
    """After the server lost the leases nobody is listed; the work must go on."""
    assert owned("dispatcher:1", []) == set(QUEUES)
    assert owned("dispatcher:1", ["dispatcher:2"]) == owned("dispatcher:1", ["dispatcher:1", "dispatcher:2"])


def test_other_holders_of_leases_are_no_dispatchers() -> None:
    assert Share("dispatcher:1", ["worker.17", "gateway:x"]).members == ("dispatcher:1",)


@given(st.sets(st.sampled_from([f"dispatcher:{one}" for one in "abcdef"]), min_size=2))
def test_a_death_takes_no_queue_from_the_living(alive: set[str]) -> None:
    gone = min(alive)
    for me in alive - {gone}:
        assert owned(me, sorted(alive)) <= owned(me, sorted(alive - {gone}))


def test_a_queue_of_another_is_served_once_its_head_has_waited_too_long() -> None:
    foreign = next(queue for queue in QUEUES if not Share("dispatcher:1", ["dispatcher:2"]).owns(queue))
    head = QueuedJob("5000-7", JobId("c0-j"), NO_FENCE, "gateway:g", 1, 1, 0)
    view = QueueView(foreign, 1, (head,))
    share = Share("dispatcher:1", ["dispatcher:2"])

    assert not share.serves(view, now_ms=6_000, take_over_ms=1_000)
    assert share.serves(view, now_ms=6_001, take_over_ms=1_000)
    assert not share.serves(QueueView(foreign, 0, ()), now_ms=9_999, take_over_ms=1_000)
