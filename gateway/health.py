"""Is it alive, can it serve, how is it doing: for machines, cheap, and answered under any load."""

import logging
from typing import Final

import orjson
from aiohttp import web

from bus.codec.wire import NodeView
from bus.link import LinkError
from gateway.auth import require
from gateway.fleet import READ_WAIT_S, Fleet
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.nodes_wire import is_active, served_models
from gateway.readiness import Facts, judge
from gateway.state import GATEWAY, Gateway

VIEW_AGE_MAX_S: Final = 0.5

log = logging.getLogger(__name__)


async def health(request: web.Request) -> web.Response:
    """200 as long as the process answers; says nothing about others."""
    return web.Response(body=b'{"status":"ok"}', content_type="application/json")


async def ready(request: web.Request) -> web.Response:
    """200 once a chat can be served, else 503 with the reasons."""
    gateway = request.app[GATEWAY]
    facts = await gather_facts(gateway)
    verdict = judge(facts)
    body = {
        "ready": verdict.ready,
        "reasons": verdict.reasons,
        "models": facts.models,
        "nodes": {"total": facts.nodes_total, "active": facts.nodes_active},
        "gateway": gateway.caller.id,
    }
    headers = {} if verdict.ready else {"Retry-After": "1"}
    return web.Response(
        status=200 if verdict.ready else 503, headers=headers, body=orjson.dumps(body), content_type="application/json"
    )


async def gather_facts(gateway: Gateway) -> Facts:
    try:
        nodes, error = (await gateway.fleet.recent(VIEW_AGE_MAX_S)).nodes, ""
    except LinkError as failure:
        nodes, error = [], str(failure)
    except TimeoutError:
        nodes, error = [], f"no answer within {READ_WAIT_S:g} s"
    return Facts(
        draining=gateway.life.draining,
        fleet_error=error,
        nodes_total=len(nodes),
        nodes_active=sum(is_active(node) for node in nodes),
        models=served_models(nodes),
    )


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: open unless the setting says otherwise."""
    gateway = request.app[GATEWAY]
    if not gateway.settings.metrics_open:
        await require(request, "admin")
    try:
        show_fleet(gateway.metrics, await gateway.fleet.recent(VIEW_AGE_MAX_S))
    except (LinkError, TimeoutError):
        log.warning("metrics without the fleet: Redis cannot be reached")
    gateway.metrics.open_chats.set(gateway.life.open_chats)
    return web.Response(body=gateway.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


def show_fleet(metrics: Metrics, fleet: Fleet) -> None:
    states = {"active": 0, "inactive": 0, "draining": 0}
    for node in fleet.nodes:
        states[metric_state(node)] += 1
    for state, count in states.items():
        metrics.nodes.labels(state).set(count)
    metrics.running.set(sum(node.running for node in fleet.nodes))
    active = [node for node in fleet.nodes if is_active(node)]
    metrics.drafted.set(sum(node.drafted for node in active))
    metrics.accepted.set(sum(node.accepted for node in active))
    metrics.loop_lag.set(max((node.loop_lag_ms for node in active), default=0.0) / 1000)


def metric_state(node: NodeView) -> str:
    if not is_active(node):
        return "inactive"
    return "draining" if node.state == "draining" else "active"
