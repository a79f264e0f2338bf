"""Can a chat be served right now, and if not, why? Pure: facts in, verdict out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known at the moment of asking. fleet_error: "" when the nodes could be read."""

    draining: bool
    fleet_error: str
    nodes_total: int
    nodes_active: int
    models: tuple[str, ...]  # of active nodes


@dataclass(frozen=True, slots=True)
class Verdict:
    ready: bool
    reasons: tuple[str, ...]


def judge(facts: Facts) -> Verdict:
    reasons = tuple(_reasons(facts))
    return Verdict(not reasons, reasons)


def _reasons(facts: Facts) -> Sequence[str]:
    if facts.draining:
        return ["this gateway is shutting down"]
    if facts.fleet_error:
        return [f"Redis cannot be reached: {facts.fleet_error}"]
    if facts.nodes_total == 0:
        return ["no node is registered"]
    if facts.nodes_active == 0:
        return [f"none of the {facts.nodes_total} registered nodes is active"]
    if not facts.models:
        return ["no active node serves a model"]
    return []
