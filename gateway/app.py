"""The routes of a gateway, and the application around them."""

from aiohttp import web

from gateway import api_chat, api_gpu, health, jobs, models, openai_chat
from gateway.middleware import errors_as_json, observe
from gateway.state import GATEWAY, Gateway


def build_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[observe, errors_as_json], client_max_size=gateway.settings.body_max)
    app[GATEWAY] = gateway
    app.add_routes(
        [
            web.post("/api/gpu/register", api_gpu.register),
            web.post("/api/gpu/heartbeat", api_gpu.heartbeat),
            web.get("/api/gpu/status", api_gpu.status),
            web.post("/api/chat/gpu", api_chat.chat_gpu),
            web.post("/api/chat", api_chat.chat_accounted),
            web.post("/v1/chat/completions", openai_chat.chat_completions),
            web.post("/v1/completions", openai_chat.completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{model:.+}", models.get_model),  # names hold slashes: org/model
            web.get("/v1/jobs/{job}", jobs.get_job),
            web.delete("/v1/jobs/{job}", jobs.cancel_job),
            # HEAD would take the stream over, and its body would follow headers that end the response.
            web.get("/v1/jobs/{job}/events", jobs.job_events, allow_head=False),
            web.get("/health", health.health),
            web.get("/ready", health.ready),
            web.get("/metrics", health.metrics),
        ]
    )
    return app
