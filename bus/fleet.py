"""What a fleet covers, counted over all registered nodes: pure, so that a gateway's status and the registry agree.

A node that is registered counts until it is removed; only its activity changes. Layers are what nodes report: they
say which parts of a model the fleet could hold, and do not bar whole prompts from a node that serves the whole model.
"""

from collections.abc import Iterable, Sequence

import msgspec

from bus.ids import NodeId

LAYER_GB = 6.0  # a node that names no layers gets one per 6 GB: the 24 GB node of the API's example holds four


class FleetNode(msgspec.Struct, frozen=True):
    """The part of a registered node that counting needs."""

    node: NodeId
    active: bool
    layers: tuple[int, ...] = ()
    layer_count: int = 0  # of its whole model; 0 = it does not say


class Coverage(msgspec.Struct, frozen=True):
    """replicas[i] is the number of active nodes that report layer i; the tuple has one entry per layer of the model."""

    total_layers: int
    replicas: tuple[int, ...]

    @property
    def uncovered(self) -> tuple[int, ...]:
        return tuple(layer for layer, count in enumerate(self.replicas) if count == 0)

    @property
    def complete(self) -> bool:
        return self.total_layers > 0 and not self.uncovered


class FleetCounts(msgspec.Struct, frozen=True):
    total: int
    active: int
    inactive: int


def count_nodes(nodes: Iterable[FleetNode]) -> FleetCounts:
    activity = [one.active for one in nodes]
    return FleetCounts(len(activity), sum(activity), len(activity) - sum(activity))


def total_layers(nodes: Iterable[FleetNode], default: int) -> int:
    """Layers of the fleet's model: as nodes say, `default` while none does; at least what the highest one needs."""
    known = list(nodes)
    said = max((one.layer_count for one in known), default=0)
    return max([said or default, *(layer + 1 for one in known for layer in one.layers)])


def layer_coverage(nodes: Iterable[FleetNode], layers: int) -> Coverage:
    """Replicas of each of `layers` layers among the active nodes; a node that repeats a layer counts once."""
    replicas = [0] * layers
    for one in nodes:
        if one.active:
            for layer in set(one.layers):
                if 0 <= layer < layers:
                    replicas[layer] += 1
    return Coverage(layers, tuple(replicas))


def layers_for_memory(gpu_memory_gb: float, layers: int) -> int:
    """How many layers a node of this memory is given: at least one, at most the whole model."""
    return max(1, min(layers, int(gpu_memory_gb // LAYER_GB)))


def least_covered_range(replicas: Sequence[int], width: int) -> tuple[int, ...]:
    """The contiguous range of `width` layers that the fleet needs most; the lowest one on a tie.

    Windows are compared by their replica counts in ascending order, so a window with one hole beats a window without
    any, whatever the sums say: a chat needs every layer.
    """
    if not replicas or width < 1:
        return ()
    width = min(width, len(replicas))
    start = min(range(len(replicas) - width + 1), key=lambda first: sorted(replicas[first : first + width]))
    return tuple(range(start, start + width))
