"""GET /api/gpu/status: all registered nodes of all cells, as JSON. Pure."""

from collections.abc import Iterable, Sequence

from bus.codec.wire import NodeView
from bus.fleet import FleetNode, count_nodes, layer_coverage, total_layers

STATUS_ACTIVE = "active"
STATUS_INACTIVE = "inactive"


def newest_of_each(nodes: Iterable[NodeView]) -> list[NodeView]:
    """One view a node id, by name. An id known in two cells (its model changed) counts where its epoch is highest."""
    newest: dict[str, NodeView] = {}
    for node in nodes:
        if node.state != "bye" and (node.node not in newest or node.epoch > newest[node.node].epoch):
            newest[node.node] = node
    return [newest[name] for name in sorted(newest)]


def is_active(node: NodeView) -> bool:
    """Alive by its beats. Whether a job would go there now also depends on leases, room and breakers."""
    return node.alive


def served_models(nodes: Iterable[NodeView]) -> tuple[str, ...]:
    """Models that some node serves whole and can take jobs for, now."""
    able = [node for node in nodes if node.alive and node.leased and node.state == "up" and node.whole]
    return tuple(sorted({model for node in able for model in node.models}))


def success_rate(node: NodeView) -> float | None:
    """Share of jobs that ended well among those whose outcome is the node's doing; None before the first."""
    judged = node.ok + node.failed
    return round(node.ok / judged, 4) if judged else None


def node_object(node: NodeView, now_ms: int) -> dict[str, object]:
    return {
        "node_id": node.node,
        "status": STATUS_ACTIVE if is_active(node) else STATUS_INACTIVE,
        "type": node.kind,
        "layers": list(node.layers),
        "load": round(node.running / node.capacity, 4) if node.capacity else 0.0,
        "success_rate": success_rate(node),
        "last_heartbeat": node.last_beat_ms / 1000,
        "last_heartbeat_age_s": round(max(0, now_ms - node.last_beat_ms) / 1000, 3),
        "models": list(node.models),
        "running": node.running,
        "max_concurrency": node.capacity,
        "gpu_memory_gb": node.gpu_memory_gb,
        "state": node.state,
        "served": node.leased,
    }


def status_object(nodes: Sequence[NodeView], now_ms: int, layers_default: int) -> dict[str, object]:
    """nodes: one view a node. layer_coverage: replicas among active nodes, by layer; the rest are counts."""
    fleet = [FleetNode(node.node, is_active(node), node.layers, node.layer_count) for node in nodes]
    counts = count_nodes(fleet)
    coverage = layer_coverage(fleet, total_layers(fleet, layers_default))
    return {
        "total_nodes": counts.total,
        "active_nodes": counts.active,
        "inactive_nodes": counts.inactive,
        "layer_coverage": {
            "total_layers": coverage.total_layers,
            "covered_layers": coverage.total_layers - len(coverage.uncovered),
            "complete": coverage.complete,
            "uncovered": list(coverage.uncovered),
            "replicas": {str(layer): count for layer, count in enumerate(coverage.replicas)},
        },
        "nodes": [node_object(node, now_ms) for node in nodes],
    }
