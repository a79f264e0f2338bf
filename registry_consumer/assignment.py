"""Layers for registrations that name none: the range that the fleet covers least."""

from collections.abc import Iterable, Sequence

import msgspec

from bus.cell import Cell
from bus.codec.events import NodeEvent, NodeRegistered
from bus.fleet import FleetNode, layer_coverage, layers_for_memory, least_covered_range, total_layers
from bus.ids import NodeId


async def assign_layers(cell: Cell, events: Sequence[tuple[str, NodeEvent]]) -> list[tuple[str, NodeEvent]]:
    """The events, with layers for each registration that omits them; asks for the fleet only if there is one."""
    if not any(_omits_layers(event) for _, event in events):
        return list(events)
    fleet = [FleetNode(view.node, view.alive, view.layers, view.layer_count) for view in await cell.nodes()]
    return fill_layers(events, fleet, cell.settings.layers_total)


def fill_layers(
    events: Iterable[tuple[str, NodeEvent]], fleet: Iterable[FleetNode], default_layers: int
) -> list[tuple[str, NodeEvent]]:
    """Each registration without layers keeps those it had, or is given the least covered range. Pure.

    Those of one batch see each other, so that nodes that join together spread out.
    """
    known = {one.node: one for one in fleet}
    filled: list[tuple[str, NodeEvent]] = []
    for entry_id, event in events:
        if isinstance(event, NodeRegistered):
            layers = _choose(event, known, default_layers) if event.layers is None else event.layers
            known[event.node] = FleetNode(event.node, True, layers, event.layer_count)
            event = msgspec.structs.replace(event, layers=layers)
        filled.append((entry_id, event))
    return filled


def _choose(event: NodeRegistered, known: dict[NodeId, FleetNode], default_layers: int) -> tuple[int, ...]:
    mine = known.get(event.node)
    if mine is not None and mine.layers:
        return mine.layers
    count = event.layer_count or total_layers(known.values(), default_layers)
    replicas = layer_coverage(known.values(), count).replicas
    return least_covered_range(replicas, layers_for_memory(event.gpu_memory_gb, count))


def _omits_layers(event: NodeEvent) -> bool:
    return isinstance(event, NodeRegistered) and event.layers is None
