"""From what the server shows to what the plan needs, and back to what `assign` takes. Pure."""

from collections.abc import Collection

import msgspec

from bus.codec.wire import CellView, NodeView, Pick, new_nonce
from bus.ids import JobId, ModelName, NodeId
from dispatcher.plan import Choice
from dispatcher.rank import Node

_encode = msgspec.json.Encoder().encode


def to_nodes(view: CellView) -> dict[ModelName, list[Node]]:
    """The nodes that may get jobs, by model; one object for a node that serves several."""
    nodes: dict[ModelName, list[Node]] = {}
    lone = {job.job_id for one in view.queues for job in one.heads if job.alone}
    for one in view.nodes.values():
        if one.alive and one.leased and one.state == "up" and one.whole:
            node = to_node(one, lone)
            for model in one.models:
                nodes.setdefault(ModelName(model), []).append(node)
    return nodes


def to_node(view: NodeView, lone: Collection[JobId]) -> Node:
    """lone: waiting jobs that must run alone. A mark for another may be void: the node is offered, `assign` knows."""
    return Node(
        NodeId(view.node),
        view.capacity,
        view.running,
        view.promised_prompt,
        view.promised_new,
        view.prefill_rate,
        view.decode_rate,
        view.failure,
        view.breaker_n > 0,
        view.breaker_until_ms,
        view.breaker_probe != "",
        view.alone if view.alone in lone else "",
        view.resume,
        view.can,
        view.cannot,
        view.context_length,
    )


def to_pick(choice: Choice) -> Pick:
    job = choice.job
    nodes = tuple([score.node for score in choice.scores])
    return Pick(job.entry_id, job.job_id, job.fence, job.out, nodes, new_nonce(), _encode(choice.scores))
