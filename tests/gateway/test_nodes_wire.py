"""The status of the fleet, as JSON."""

from typing import Any

from bus.codec.wire import NodeView
from bus.ids import NodeId
from gateway.nodes_wire import newest_of_each, node_object, served_models, status_object, success_rate


def node(name: str, **changes: Any) -> NodeView:
    view: dict[str, Any] = {
        "node": NodeId(name), "state": "up", "alive": True, "leased": True, "owner": "o", "kind": "torch",
        "models": ("smol",), "capacity": 4, "running": 1, "promised_prompt": 0, "promised_new": 0, "prefill_rate": 0.0,
        "decode_rate": 0.0, "failure": 0.0, "breaker_n": 0, "breaker_until_ms": 0, "alone": "", "last_beat_ms": 5_000,
    }  # fmt: skip
    return NodeView(**{**view, **changes})


def test_all_registered_nodes_count_alive_or_not() -> None:
    status = status_object([node("a"), node("b", alive=False)], 6_000, 4)

    assert (status["total_nodes"], status["active_nodes"], status["inactive_nodes"]) == (2, 1, 1)
    assert [(one["node_id"], one["status"]) for one in status["nodes"]] == [("a", "active"), ("b", "inactive")]  # type: ignore[attr-defined]  # JSON


def test_coverage_counts_replicas_of_active_nodes_only() -> None:
    fleet = [node("a", layers=(0, 1)), node("b", layers=(1, 2)), node("c", layers=(3,), alive=False)]

    coverage = status_object(fleet, 6_000, 4)["layer_coverage"]

    assert coverage == {
        "total_layers": 4,
        "covered_layers": 3,
        "complete": False,
        "uncovered": [3],
        "replicas": {"0": 1, "1": 2, "2": 1, "3": 0},
    }


def test_load_is_the_share_of_reserved_places_and_the_heartbeat_is_unix_seconds() -> None:
    shown = node_object(node("a", capacity=4, running=3), now_ms=6_500)

    assert (shown["load"], shown["last_heartbeat"], shown["last_heartbeat_age_s"]) == (0.75, 5.0, 1.5)


def test_a_node_without_a_judged_job_has_no_success_rate() -> None:
    assert success_rate(node("a")) is None
    assert success_rate(node("a", ok=3, failed=1, client_errors=9)) == 0.75


def test_a_node_that_moved_to_another_cell_is_shown_once_as_it_is_now() -> None:
    shown = newest_of_each([node("a", epoch=1, models=("old",)), node("a", epoch=2, models=("new",))])

    assert [one.models for one in shown] == [("new",)]


def test_a_node_that_said_goodbye_is_not_shown() -> None:
    assert newest_of_each([node("a", state="bye")]) == []


def test_a_model_is_served_only_by_nodes_that_take_jobs_for_the_whole_of_it() -> None:
    fleet = [
        node("a", models=("x",), alive=False),
        node("b", models=("y",), leased=False),
        node("c", models=("z",), whole=False),
        node("d", models=("w",), state="draining"),
        node("e", models=("smol", "big")),
    ]

    assert served_models(fleet) == ("big", "smol")
