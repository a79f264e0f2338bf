"""One gateway process: connect, listen, serve until told to stop, then let open requests end.

start: server fit -> caller (out-streams, lease) -> routes -> listening -> ready
stop:  /ready answers 503, new chats are refused -> open chats end (drain_grace_ms) -> connections close -> lease goes
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

from bus.address_guard import AddressPolicy, AllowError, guarded_session
from bus.api_keys import READS_MAX, ApiKeys
from bus.calls.caller import Caller
from bus.link import ServerAddress, client
from bus.process.child import ParentLine
from bus.process.exits import StartError
from bus.process.startup import prepare_server
from bus.settings import Settings
from gateway.app import build_app
from gateway.fleet import FleetReader
from gateway.http_log import http_log
from gateway.probe import NodeProbe
from gateway.state import Gateway

KEEPALIVE_S: Final = 75.0  # longer than the 60 s of usual proxies, so that they close first
CLOSE_WAIT_S: Final = 0.25  # for handlers that still run when the grace is over; honcho kills after 5 s in all

log = logging.getLogger(__name__)


async def run(settings: Settings, parent: ParentLine) -> None:
    """Raises StartError when the port is taken or a setting cannot work, LinkDown when the server is away."""
    address = await prepare_server(settings)
    async with open_gateway(settings, address) as gateway, listen(gateway) as port:
        # The parent is not told of the lease: after a kill it has to lapse by itself, because until then the clients
        # of this gateway may take their streams up again on another one.
        parent.ready()
        log.info("gateway listens", extra={"host": settings.gateway_host, "port": port, "id": gateway.caller.id})
        await parent.stop.wait()
        await drain(gateway)


@asynccontextmanager
async def open_gateway(settings: Settings, address: ServerAddress) -> AsyncIterator[Gateway]:
    try:
        policy = AddressPolicy.parse(settings.node_allow)
    except AllowError as error:
        raise StartError(str(error)) from error
    async with (
        client(address, connections_max=READS_MAX) as key_client,
        guarded_session(policy) as session,
    ):
        caller = await Caller(address, settings, name="gateway").start()
        keys = ApiKeys(key_client, cache_s=settings.key_cache_ms / 1000)
        fleet = FleetReader(caller.cells)
        try:
            yield Gateway(
                settings=settings,
                caller=caller,
                keys=keys,
                fleet=fleet,
                probe=NodeProbe(session, settings.node_health_timeout_ms / 1000),
                address_policy=policy,
                started_s=int(time.time()),
            )
        finally:
            await fleet.close()
            await keys.close()
            # Streams that were cut off may be taken up on another gateway until our lease has lapsed.
            await caller.close(hand_over=True)


@asynccontextmanager
async def listen(gateway: Gateway) -> AsyncIterator[int]:
    """Serve the routes; yields the port. Raises StartError with what to do when it is taken."""
    settings = gateway.settings
    runner = web.AppRunner(
        build_app(gateway),
        # Off by default in aiohttp: without it a job would run on for a client that is gone.
        handler_cancellation=True,
        access_log=None,
        logger=http_log(),
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=CLOSE_WAIT_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.gateway_host, settings.gateway_port)
        try:
            await site.start()
        except OSError as error:
            where = f"{settings.gateway_host}:{settings.gateway_port}"
            hint = "set MILLRACE_GATEWAY_PORT (or MILLRACE_GATEWAY2_PORT) to a free one"
            raise StartError(f"cannot listen on {where} ({error.strerror or error}): {hint}") from error
        yield port_of(runner.addresses)
    finally:
        await runner.cleanup()


def port_of(addresses: list[Any]) -> int:
    return int(addresses[0][1])


async def drain(gateway: Gateway) -> None:
    """Refuse new chats, let the open ones end. Those that do not are cut off; their jobs go on by their policy."""
    gateway.life.draining = True
    if gateway.life.open_chats:
        log.info("draining", extra={"open_chats": gateway.life.open_chats})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gateway.life.idle.wait(), gateway.settings.drain_grace_ms / 1000)
    log.info("drained", extra={"open_chats": gateway.life.open_chats})
