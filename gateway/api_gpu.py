"""Nodes over HTTP: register, heartbeat, status.

A registration is decided by the script that the registry runs, not here: the gateway checks the node, takes the lock
of its id, whose token is the epoch, publishes the event and waits for the answer on its own stream. So whoever asks
any gateway for the status afterwards sees the node. A heartbeat waits for nothing but its append.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import orjson
from aiohttp import web

from bus.address_guard import AddressPolicy, AddressRefused, parse_target
from bus.cell import Cell
from bus.codec.events import HttpBeat, NodeBye, NodeRegistered
from bus.codec.wire import LockBusy, NodeView
from bus.ids import ModelName, NodeId, cell_of_model
from gateway.auth import limit_status, require
from gateway.body import read_json, read_object
from gateway.errors import ApiError
from gateway.nodes_wire import status_object
from gateway.registration import Registration, parse_heartbeat, parse_registration
from gateway.responses import json_response
from gateway.state import GATEWAY, Gateway

LOCK_MARGIN_MS: Final = 10_000  # beyond the health check: for its fallback and the registry's answer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """Where a node id is registered now."""

    cell: Cell
    node: NodeView


async def status(request: web.Request) -> web.Response:
    """GET /api/gpu/status: all registered nodes, read after the request came in; limited per client address."""
    await limit_status(request)
    gateway = request.app[GATEWAY]
    fleet = await gateway.fleet.read()
    return json_response(status_object(fleet.nodes, fleet.now_ms, gateway.settings.layers_total))


async def heartbeat(request: web.Request) -> web.Response:
    """POST /api/gpu/heartbeat: only for the key that registered the node; an unknown node is never created."""
    key = await require(request, "node")
    node_id = parse_heartbeat(await read_json(request))
    gateway = request.app[GATEWAY]
    known = newest(await find_node(gateway, node_id))
    if known is None:
        raise ApiError("node_not_found", f"node {node_id} is not registered; register it first", param="node_id")
    if known.node.key_id != key.id:
        raise ApiError("not_owner", f"node {node_id} was registered with another key", param="node_id")
    await known.cell.publish_node_event(HttpBeat(node_id, key.id))
    return json_response({"success": True, "message": "heartbeat received", "node_id": node_id, "status": "active"})


async def register(request: web.Request) -> web.Response:
    """POST /api/gpu/register: lock the id, check the node, publish, wait for what the registry made of it."""
    key = await require(request, "node")
    wanted = parse_registration(await read_object(request))
    gateway = request.app[GATEWAY]
    check_address(wanted.api_url, gateway.address_policy)
    check_owner(await find_node(gateway, wanted.node_id), key.id)  # an early no: strangers do not get the lock
    async with lock(gateway, wanted.node_id) as token:
        earlier = await find_node(gateway, wanted.node_id)
        check_owner(earlier, key.id)
        models = await look_at(gateway, wanted)
        epoch = max([token, *(known.node.epoch + 1 for known in earlier)])
        layers = await _apply(gateway, wanted, models, key.id, epoch)
        await _leave_other_cells(gateway, earlier, models, key.id)
    log.info("node registered", extra={"node": wanted.node_id, "url": wanted.api_url, "models": models, "key": key.id})
    return json_response(
        {
            "success": True,
            "message": f"node {wanted.node_id} is registered",
            "node_id": wanted.node_id,
            "layers_assigned": layers,
            "status": "active",
            "models": models,
            "max_concurrency": wanted.max_concurrency,
        }
    )


@asynccontextmanager
async def lock(gateway: Gateway, node_id: NodeId) -> AsyncIterator[int]:
    """One registration of an id at a time, over all gateways; yields the fencing token. Raises ApiError 409.

    The lock lies in the cell that the id names, so that it is one lock whatever models are registered.
    """
    cells = gateway.caller.cells
    cell = cells[cell_of_model(node_id, len(cells))]
    taken = await cell.lock_node(node_id, gateway.settings.node_health_timeout_ms + LOCK_MARGIN_MS)
    if isinstance(taken, LockBusy):
        message = f"node {node_id} is being registered by somebody else right now"
        raise ApiError("registration_in_progress", message, retry_after_ms=taken.retry_after_ms)
    try:
        yield taken.epoch
    finally:
        await asyncio.shield(cell.unlock_node(node_id, taken.epoch))


def check_address(api_url: str, policy: AddressPolicy) -> None:
    """Gate 1 of the address guard; names are checked again where they are dialled."""
    try:
        parse_target(api_url, policy)
    except AddressRefused as error:
        raise ApiError("address_not_allowed", f"api_url is not allowed: {error}", param="api_url") from error


def check_owner(earlier: list[Known], key_id: str) -> None:
    """An early no, before anything is called; the apply script has the last word."""
    known = newest(earlier)
    if known is not None and known.node.key_id != key_id:
        message = f"node {known.node.node} belongs to another key; register it with that one or choose another id"
        raise ApiError("not_owner", message, param="node_id")


def newest(known: list[Known]) -> Known | None:
    """The registration that counts: the highest epoch, unless the node has said goodbye."""
    best = max(known, key=lambda one: one.node.epoch, default=None)
    return None if best is None or best.node.state == "bye" else best


async def find_node(gateway: Gateway, node_id: NodeId) -> list[Known]:
    """In all cells: a node's cell follows from its model, which an id does not tell."""
    cells = gateway.caller.cells
    nodes = await asyncio.gather(*(cell.node(node_id) for cell in cells))
    return [Known(cell, node) for cell, node in zip(cells, nodes, strict=True) if node is not None]


async def look_at(gateway: Gateway, wanted: Registration) -> tuple[ModelName, ...]:
    """Is the node well, and what does it serve: as registered, else what it lists, else the fleet's default.

    All its models live in one cell, as the node does. Both questions share one time limit: the lock is held meanwhile.
    """
    settings = gateway.settings
    named = (wanted.model,) if wanted.model is not None else ()
    asked: tuple[ModelName, ...] = ()
    if settings.node_health_check:
        try:
            async with asyncio.timeout(settings.node_health_timeout_ms / 1000):
                await gateway.probe.check_health(wanted.api_url)
                asked = named or await gateway.probe.ask_models(wanted.api_url)
        except TimeoutError:
            message = f"{wanted.api_url} did not answer within {settings.node_health_timeout_ms} ms"
            raise ApiError("node_unhealthy", message, param="api_url") from None
    return named or same_cell(asked, len(gateway.caller.cells)) or (ModelName(settings.model),)


def same_cell(models: tuple[ModelName, ...], cells: int) -> tuple[ModelName, ...]:
    """The first model and those that live in its cell."""
    return tuple(model for model in models if cell_of_model(model, cells) == cell_of_model(models[0], cells))


async def _apply(
    gateway: Gateway, wanted: Registration, models: tuple[ModelName, ...], key_id: str, epoch: int
) -> list[int]:
    """Publish under the lock. Answers the layers that the node has now; raises ApiError for every other outcome."""
    event = NodeRegistered(
        node=wanted.node_id,
        epoch=epoch,
        key_id=key_id,
        api_url=wanted.api_url,
        models=models,
        capacity=wanted.max_concurrency,
        layers=wanted.layers,
        gpu_memory_gb=wanted.gpu_memory_gb,
        can=wanted.can,
    )
    cell = gateway.caller.cell_of(models[0])
    answer = await gateway.caller.ask(event, cell, timeout_s=gateway.settings.register_wait_ms / 1000)
    if answer is None:
        message = "the registry did not apply the registration in time; it may still do so: look at the status"
        raise ApiError("registry_timeout", message)
    match answer.status:
        case "applied":
            return parse_layers(answer.detail, wanted.layers)
        case "not_owner":
            raise ApiError("not_owner", f"node {wanted.node_id} belongs to another key", param="node_id")
        case _:
            message = f"a newer registration of node {wanted.node_id} came first ({answer.status})"
            raise ApiError("superseded", message, param="node_id")


def parse_layers(detail: str, asked: tuple[int, ...] | None) -> list[int]:
    """The registry says which layers it assigned, as JSON {"layers": [...]}."""
    try:
        layers = orjson.loads(detail)["layers"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return list(asked or ())
    return [layer for layer in layers if isinstance(layer, int)]


async def _leave_other_cells(
    gateway: Gateway, earlier: list[Known], models: tuple[ModelName, ...], key_id: str
) -> None:
    """A node whose model now lives in another cell has moved: its old registration says goodbye."""
    home = cell_of_model(models[0], len(gateway.caller.cells))
    for known in earlier:
        if known.cell.cell != home and known.node.state != "bye":
            await known.cell.publish_node_event(NodeBye(known.node.node, known.node.epoch, key_id))
