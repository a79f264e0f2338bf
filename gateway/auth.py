"""Who asks: the key of a request, checked for the scope that its route needs, and limits per sender."""

from aiohttp import web

from bus.api_keys import KeyRecord
from bus.ids import cell_of_model
from gateway.bearer import client_address, parse_bearer
from gateway.errors import ApiError
from gateway.state import GATEWAY


async def require(request: web.Request, scope: str) -> KeyRecord:
    """Raises ApiError 401 (no such key) or 403 (not for this route); 503 if that cannot be found out."""
    key = parse_bearer(request.headers.get("Authorization"))
    record = await request.app[GATEWAY].keys.check(key)
    if record is None:
        raise ApiError("invalid_api_key", "the API key is unknown or revoked")
    if not record.allows(scope):
        message = f"this API key has no `{scope}` scope; make one with `millrace keys create --scope {scope}`"
        raise ApiError("insufficient_scope", message)
    return record


async def limit_address(request: web.Request) -> str:
    """The rate limit of open chats, per client address and true across gateways. Answers the address.

    Raises ApiError 429."""
    return await _limit_address(request, "ip", request.app[GATEWAY].settings.open_rate_per_minute)


async def limit_status(request: web.Request) -> None:
    """The status has an allowance of its own, so that a page that polls it eats no chats. Raises ApiError 429."""
    await _limit_address(request, "status", request.app[GATEWAY].settings.status_rate_per_minute)


async def _limit_address(request: web.Request, what: str, most: int) -> str:
    gateway = request.app[GATEWAY]
    forwarded = request.headers.get("X-Forwarded-For")
    address = client_address(request.remote, forwarded, trust_forwarded=gateway.settings.trust_forwarded)
    if most:
        await _limit(request, f"{what}:{address}", most, "this address")
    return address


async def limit_key(request: web.Request, key: KeyRecord) -> None:
    if key.limits.rate_per_minute:
        await _limit(request, f"key:{key.id}", key.limits.rate_per_minute, "this key")


async def _limit(request: web.Request, name: str, most: int, whose: str) -> None:
    cells = request.app[GATEWAY].caller.cells
    # One cell counts for a name, so the limit is one limit however many cells and gateways there are.
    wait_ms = await cells[cell_of_model(name, len(cells))].rate(name, most)
    if wait_ms:
        raise ApiError("rate_limited", f"{whose} may send {most} requests a minute", retry_after_ms=wait_ms)
