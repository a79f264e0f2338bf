"""Values as JSON responses."""

import orjson
from aiohttp import web


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
