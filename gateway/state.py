"""What the handlers of one gateway share. It is made in `gateway.service`, handed to the app, and lives there."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from bus.address_guard import AddressPolicy
from bus.api_keys import ApiKeys
from bus.caller import Caller
from bus.settings import Settings
from gateway.fleet import FleetReader
from gateway.metrics import Metrics
from gateway.probe import NodeProbe


@dataclass
class Life:
    """Whether this gateway takes chats, and how many it has open."""

    draining: bool = False
    open_chats: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def chat(self) -> Iterator[None]:
        self.open_chats += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.open_chats -= 1
            if not self.open_chats:
                self.idle.set()


@dataclass(frozen=True)
class Gateway:
    settings: Settings
    caller: Caller
    keys: ApiKeys
    fleet: FleetReader
    probe: NodeProbe
    address_policy: AddressPolicy
    started_s: int  # unix time; `created` of models, which have no better one
    metrics: Metrics = field(default_factory=Metrics)
    life: Life = field(default_factory=Life)


GATEWAY = web.AppKey("gateway", Gateway)
REQUEST_ID = web.RequestKey("request_id", str)
