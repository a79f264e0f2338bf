"""Ready means that a chat sent now is answered."""

import dataclasses
from typing import Any

from gateway.readiness import Facts, judge

GOOD = Facts(draining=False, fleet_error="", nodes_total=2, nodes_active=1, models=("smol",))


def test_one_active_node_with_a_model_is_enough() -> None:
    assert judge(GOOD).ready


def test_each_reason_is_said() -> None:
    cases: dict[str, dict[str, Any]] = {
        "shutting down": {"draining": True},
        "Redis": {"fleet_error": "connection refused"},
        "no node is registered": {"nodes_total": 0, "nodes_active": 0, "models": ()},
        "none of the 2": {"nodes_active": 0, "models": ()},
        "serves a model": {"models": ()},
    }
    for words, change in cases.items():
        verdict = judge(dataclasses.replace(GOOD, **change))
        assert not verdict.ready
        assert words in " ".join(verdict.reasons)
