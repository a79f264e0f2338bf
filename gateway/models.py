"""GET /v1/models and /v1/models/{id}: what the fleet serves now."""

from aiohttp import web

from gateway.auth import require
from gateway.errors import ApiError
from gateway.health import VIEW_AGE_MAX_S
from gateway.nodes_wire import served_models
from gateway.openai_wire import model_list, model_object
from gateway.responses import json_response
from gateway.state import GATEWAY


async def list_models(request: web.Request) -> web.Response:
    await require(request, "chat")
    gateway = request.app[GATEWAY]
    fleet = await gateway.fleet.recent(VIEW_AGE_MAX_S)
    return json_response(model_list(list(served_models(fleet.nodes)), gateway.started_s))


async def get_model(request: web.Request) -> web.Response:
    await require(request, "chat")
    gateway = request.app[GATEWAY]
    name = request.match_info["model"]
    fleet = await gateway.fleet.recent(VIEW_AGE_MAX_S)
    if name not in served_models(fleet.nodes):
        raise ApiError(
            "model_not_found", f"the model `{name[:128]}` does not exist or nobody serves it now", param="model"
        )
    return json_response(model_object(name, gateway.started_s))
