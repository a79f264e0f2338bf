"""Which relay serves which node: decided by each relay alone from what the server shows."""

import msgspec

from bus.codec.wire import NodeView
from bus.ids import Holder, NodeId, rendezvous
from gpu_worker.relay_engine.watch import PATIENCE_S, Serving, Unowned, WatchPlan, plan_watch, relays_of, to_relay_node

ME = Holder("relay:a.1")
OTHER = Holder("relay:b.1")


def view(name: str = "n", *, owner: str = "", leased: bool = False, **changes: object) -> NodeView:
    fresh = NodeView(
        node=NodeId(name),
        state="up",
        alive=True,
        leased=leased,
        owner=owner,
        kind="http",
        models=("m",),
        capacity=4,
        running=0,
        promised_prompt=0,
        promised_new=0,
        prefill_rate=0,
        decode_rate=0,
        failure=0,
        breaker_n=0,
        breaker_until_ms=0,
        alone="",
        last_beat_ms=0,
        api_url="http://node",
    )
    return msgspec.structs.replace(fresh, **changes)


def plan(
    *views: NodeView, served: dict[NodeId, Serving] | None = None, relays: list[str] | None = None, free_s: float = 0
) -> WatchPlan:
    return plan_watch(ME, relays or [ME], views, served or {}, {one.node: free_s for one in views if not one.leased})


def taken(*views: NodeView, relays: list[str] | None = None, free_s: float = 0) -> list[str]:
    return [node.id for node in plan(*views, relays=relays, free_s=free_s).take]


def serving(one: NodeView, *, draining: bool = False) -> dict[NodeId, Serving]:
    return {one.node: Serving(to_relay_node(one), draining)}


def test_a_lone_relay_takes_every_live_http_node_without_an_owner() -> None:
    assert taken(view("a"), view("b"), view("c", owner="relay:dead.1")) == ["a", "b", "c"]


def test_nodes_that_others_serve_dial_out_themselves_are_dead_or_have_left_are_not_taken() -> None:
    assert taken(view(owner=OTHER, leased=True)) == []
    assert taken(view(kind="torch")) == []
    assert taken(view(alive=False)) == []
    assert taken(view(state="bye")) == []


def test_relays_share_nodes_each_taking_its_own_at_once() -> None:
    views = [view(f"n{number}") for number in range(40)]

    mine = set(taken(*views, relays=[ME, OTHER]))

    assert mine == {one.node for one in views if rendezvous(one.node, [ME, OTHER])[0] == ME}
    assert 5 < len(mine) < 35


def test_a_node_that_its_relay_does_not_take_is_taken_by_any_other_after_a_while() -> None:
    views = [view(f"n{number}") for number in range(10)]

    assert len(taken(*views, relays=[ME, OTHER], free_s=PATIENCE_S)) == 10


def test_a_node_that_is_mine_but_not_served_is_served_again() -> None:
    """Its service failed, or the relay's answer was lost."""
    assert taken(view(owner=ME, leased=True), relays=[ME, OTHER]) == ["n"]


def test_a_served_node_that_is_as_it_was_stays() -> None:
    node = view(owner=ME, leased=True)

    assert plan(node, served=serving(node)) == WatchPlan()
    assert plan(msgspec.structs.replace(node, epoch=9, alive=False, layers=(1,)), served=serving(node)) == WatchPlan()


def test_a_node_that_registered_again_with_something_else_is_served_anew() -> None:
    node = view(owner=ME, leased=True)

    for changed in ({"api_url": "http://moved"}, {"capacity": 8}, {"models": ("other",)}):
        assert plan(msgspec.structs.replace(node, **changed), served=serving(node)).leave == ("n",)


def test_a_node_that_is_gone_or_has_left_is_no_longer_served() -> None:
    node = view(owner=ME, leased=True)

    assert plan(served=serving(node)).leave == ("n",)
    assert plan(msgspec.structs.replace(node, state="bye"), served=serving(node)).leave == ("n",)


def test_a_drained_node_is_served_anew_once_it_registers_again() -> None:
    node = view(owner=ME, leased=True)

    assert plan(msgspec.structs.replace(node, state="draining"), served=serving(node, draining=True)).leave == ()
    assert plan(node, served=serving(node, draining=True)).leave == ("n",)


def test_a_capacity_of_nothing_is_at_least_one() -> None:
    assert to_relay_node(view(capacity=0)).capacity == 1


def test_other_relays_are_known_by_their_leases() -> None:
    assert relays_of(["dispatcher:x", OTHER, "w.5"], ME) == [ME, OTHER]


def test_time_without_an_owner_counts_from_the_first_look_that_saw_it() -> None:
    unowned = Unowned()

    assert unowned.see([view("a")], 10.0) == {"a": 0.0}
    assert unowned.see([view("a"), view("b")], 11.5) == {"a": 1.5, "b": 0.0}
    assert unowned.see([view("a", leased=True)], 12.0) == {}
    assert unowned.see([view("a")], 13.0) == {"a": 0.0}
