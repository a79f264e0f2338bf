"""The registry's order: (epoch, stream entry id), whatever the order of deliveries."""

import random

from hypothesis import given
from hypothesis import strategies as st

from bus.ids import NodeId
from registry_consumer.fold import Kind, News, NodeState, fold, fold_all, parse_entry_id, status, to_apply

TTL = 30_000


def news(kind: Kind, epoch: int, at_ms: int, seq: int = 0, node: str = "n", sender: str = "") -> News:
    return News(epoch, (at_ms, seq), kind, NodeId(node), sender)


def after(*events: News) -> NodeState:
    state = NodeState()
    for event in events:
        state = fold(state, event)
    return state


def test_a_late_beat_of_an_older_epoch_changes_nothing() -> None:
    state = after(news("register", 2, 1_000), news("beat", 1, 5_000))

    assert state.epoch == 2
    assert state.last_sign == (1_000, 0)


def test_a_backlog_of_old_beats_revives_nobody() -> None:
    """The TTL counts from the entry id, not from when the backlog is read."""
    state = after(*(news("beat", 1, moment) for moment in range(0, 5_000, 100)))

    assert status(state, now_ms=4_900 + TTL, ttl_ms=TTL) == "inactive"


def test_a_fresh_beat_keeps_a_live_node_alive_though_older_news_arrive_after_it() -> None:
    state = after(news("beat", 1, 60_000), news("beat", 1, 100), news("register", 1, 50))

    assert status(state, now_ms=61_000, ttl_ms=TTL) == "active"


def test_a_beat_alone_recreates_its_node() -> None:
    """After a FLUSHALL nothing is known; a worker's beat is full state."""
    assert status(after(news("beat", 7, 1_000)), 2_000, TTL) == "active"


def test_an_http_beat_creates_nothing_and_keeps_a_known_node() -> None:
    assert status(after(news("http_beat", 0, 1_000)), 1_001, TTL) == "unknown"
    assert status(after(news("http_beat", 0, 40_000), news("register", 3, 1_000)), 60_000, TTL) == "active"


def test_nothing_of_an_epoch_that_said_bye_revives_it() -> None:
    state = after(news("beat", 4, 1_000), news("bye", 4, 2_000), news("beat", 4, 3_000))

    assert status(state, 3_001, TTL) == "left"


def test_a_new_epoch_after_bye_is_alive() -> None:
    assert status(after(news("bye", 4, 2_000), news("beat", 5, 1_500)), 3_000, TTL) == "active"


def test_draining_ends_with_the_epoch() -> None:
    assert after(news("beat", 4, 1_000), news("drain", 4, 900)).draining
    assert not after(news("drain", 4, 900), news("register", 5, 1_000)).draining


def test_a_batch_is_reduced_to_the_newest_beat_per_node_and_all_registrations() -> None:
    """500 beats of one node cost one script, yet every registration gets its answer."""
    beats = [news("beat", 1, moment) for moment in range(100)]
    registrations = [news("register", 1, 5), news("register", 2, 7)]
    other = news("beat", 1, 3, node="other")

    kept = to_apply([*beats, *registrations, other])

    assert kept == [other, *registrations, beats[-1]]


def test_another_keys_beat_or_departure_takes_nobodys_place() -> None:
    """Whose they are is checked by the scripts; a batch must leave the owner's for them."""
    mine = [news("http_beat", 0, 10, sender="mine"), news("bye", 1, 11, sender="mine")]
    foreign = [news("http_beat", 0, 20, sender="foreign"), news("bye", 9, 21, sender="foreign")]

    assert to_apply([*mine, *foreign]) == [*mine, *foreign]


def test_only_the_owners_beats_count_as_signs_of_life() -> None:
    registered = news("register", 3, 1_000, sender="mine")

    state = after(registered, news("http_beat", 0, 5_000, sender="mine"), news("http_beat", 0, 9_000, sender="foreign"))

    assert state.last_sign == (5_000, 0)


def test_entry_ids_compare_as_numbers() -> None:
    assert parse_entry_id("999-10") > parse_entry_id("999-9")
    assert parse_entry_id("1000-0") > parse_entry_id("999-9")


kinds: st.SearchStrategy[Kind] = st.sampled_from(["register", "beat", "http_beat", "drain", "bye"])
events_drawn = st.lists(
    st.builds(
        lambda kind, epoch, at, seq, node, sender: news(
            kind,
            0 if kind == "http_beat" else epoch,
            at,
            seq,
            node,
            sender if kind in ("register", "http_beat", "bye") else "",
        ),
        kinds,
        st.integers(1, 4),
        st.integers(0, 100_000),
        st.integers(0, 3),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["", "k"]),
    ),
    max_size=12,
)


@given(events_drawn, st.randoms(use_true_random=False))
def test_any_order_of_deliveries_ends_in_the_same_state(events: list[News], rng: random.Random) -> None:
    shuffled = [*events, *rng.sample(events, k=len(events) // 2)]  # some are delivered twice
    rng.shuffle(shuffled)

    assert fold_all(shuffled) == fold_all(events)


@given(events_drawn, st.randoms(use_true_random=False))
def test_any_split_over_consumers_and_reduction_of_batches_ends_in_the_same_state(
    events: list[News], rng: random.Random
) -> None:
    """Three consumers reduce their own batches; what they apply, in whatever order, is worth the whole."""
    batches: list[list[News]] = [[], [], []]
    for event in events:
        rng.choice(batches).append(event)
    applied = [one for batch in batches for one in to_apply(batch)]
    rng.shuffle(applied)

    assert fold_all(applied) == fold_all(events)


@given(events_drawn, st.integers(0, 200_000))
def test_a_node_is_active_only_within_the_ttl_of_a_sign_of_a_living_epoch(events: list[News], now: int) -> None:
    for node, state in fold_all(events).items():
        if status(state, now, TTL) == "active":
            left = max((one.epoch for one in events if one.node == node and one.kind == "bye"), default=0)
            assert any(
                one.node == node
                and one.kind != "bye"
                and now - one.entry[0] < TTL
                and (one.epoch > left or one.kind == "http_beat")
                for one in events
            )
