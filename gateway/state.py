"""What the handlers of one gateway share. It is made in `gateway.service`, handed to the app, and lives there."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from bus.address_guard import AddressPolicy
from bus.api_keys import ApiKeys
from bus.calls.caller import Caller
from bus.settings import Settings
from gateway.fleet import FleetReader
from gateway.metrics import Metrics
from gateway.probe import NodeProbe

OUTAGE_LOG_S: Final = 5.0


@dataclass
class Life:
    """Whether this gateway takes chats, and how many it has open."""

    draining: bool = False
    open_chats: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    outage_logged_s: float = -OUTAGE_LOG_S

    def outage_is_news(self) -> bool:
        """Once in a while: in an outage every request fails for the same reason."""
        now = time.monotonic()
        if now - self.outage_logged_s < OUTAGE_LOG_S:
            return False
        self.outage_logged_s = now
        return True

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
CHAT_LOGGED = web.RequestKey("chat_logged", bool)  # the one line of its chat says it all
