"""Queues are shared by rendezvous; a stale head belongs to anyone."""

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.sharing import own_queues, waits_too_long

QUEUES = [f"queue:model-{index}:1" for index in range(40)]


def test_every_queue_has_exactly_one_owner_among_the_live_dispatchers() -> None:
    shares = [own_queues(QUEUES, ["d1", "d2", "d3"], me) for me in ("d1", "d2", "d3")]

    assert sorted(queue for share in shares for queue in share) == sorted(QUEUES)
    assert all(share for share in shares)


def test_a_dispatcher_alone_or_unlisted_serves_everything_it_may_own() -> None:
    """After the server lost the leases nobody is listed; the work must go on."""
    assert own_queues(QUEUES, [], "d1") == QUEUES
    assert own_queues(QUEUES, ["d1"], "d1") == QUEUES
    assert set(own_queues(QUEUES, ["d2"], "d1")) == set(own_queues(QUEUES, ["d1", "d2"], "d1"))


@given(st.sets(st.sampled_from("abcdef"), min_size=2))
def test_a_death_moves_only_the_queues_of_the_dead(alive: set[str]) -> None:
    gone = min(alive)
    for me in alive - {gone}:
        before = set(own_queues(QUEUES, sorted(alive), me))
        after = set(own_queues(QUEUES, sorted(alive - {gone}), me))
        assert before <= after


def test_a_head_is_stale_only_after_the_owner_had_its_time() -> None:
    assert not waits_too_long("5000-0", 6_000, take_over_ms=1_000)
    assert waits_too_long("5000-7", 6_001, take_over_ms=1_000)
