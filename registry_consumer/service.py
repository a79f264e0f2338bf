"""The registry consumer: registrations, heartbeats, drain and bye -> node hashes with TTLs.

    nodes --batch of 500--> parse --foreign--> dead
                              |
                            reduce (fold.to_apply): the newest beat per node, every registration
                              |
                            layers for registrations that omit them (assign_layers)
                              |
                            apply_events: script checks (epoch, entry id), answers, acks and deletes

Several run at once on one stream; which of them applies what, and in which order, does not matter (fold.py).
Acknowledged only after the effect: a crash in between delivers again, and the scripts find nothing to change.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack

from bus.cell import Cell
from bus.codec.events import ForeignEntry, NodeEvent, NodeRegistered, parse_event
from bus.codec.fields import MOMENT_MAX
from bus.codec.wire import Applied
from bus.ids import NodeId, is_node_id
from bus.keys import REGISTRY_GROUP, CellKeys
from bus.link import Entry, Fields, Link, LinkError, Reader, ServerAddress, ServerError
from bus.link.group import GroupReader
from bus.process.child import ParentLine
from bus.process.startup import prepare_server
from bus.process.steady import keep_doing, pause, until_done
from bus.settings import Settings
from registry_consumer.assignment import assign_layers
from registry_consumer.fold import to_apply
from registry_consumer.news import kind_of, to_news

BATCH = 500
AGE_EVERY_S = 1.0

log = logging.getLogger(__name__)


async def run(settings: Settings, parent: ParentLine) -> None:
    """All cells until the parent says stop; what is in hand is applied first."""
    address = await prepare_server(settings)
    consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    async with AsyncExitStack() as stack:
        registries = [await _open(stack, address, number, consumer, settings) for number in range(settings.cells)]
        parent.ready()
        async with asyncio.TaskGroup() as group:
            for number, registry in enumerate(registries):
                group.create_task(registry.run(parent.stop), name=f"registry c{number}")


async def _open(
    stack: AsyncExitStack, address: ServerAddress, number: int, consumer: str, settings: Settings
) -> "Registry":
    name, any_key = f"registry.c{number}", CellKeys(number).nodes
    timeout_s, wait_s = settings.connect_timeout_ms / 1000, settings.send_wait_ms / 1000
    link = await Link.connect(address, name=name, cell_key=any_key, connect_timeout_s=timeout_s, wait_s=wait_s)
    await stack.enter_async_context(link)
    reader = Reader(address, name=f"{name}.reader", cell_key=any_key, connect_timeout_s=timeout_s)
    await stack.enter_async_context(reader)
    return Registry(Cell(link, number, settings), reader, consumer)


class Registry:
    """One consumer on one cell's `nodes` stream."""

    def __init__(self, cell: Cell, reader: Reader, consumer: str) -> None:
        self._cell = cell
        self._settings = cell.settings
        self._group = GroupReader(
            cell.link, reader, cell.keys.nodes, REGISTRY_GROUP, consumer, claim_idle_ms=cell.settings.claim_idle_ms
        )
        self._said: dict[NodeId, int] = {}  # silent nodes, with the beat after which that was said

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            steps = [
                group.create_task(keep_doing("registry batch", self.step, stop), name="batches"),
                group.create_task(keep_doing("node ages", lambda: self._age(stop), stop), name="ages"),
            ]
            await stop.wait()
            await until_done(steps, self._group.unblock)
        try:
            await self._group.leave()
        except LinkError:
            log.warning("left without a word: others remove this consumer")

    async def step(self) -> None:
        """Wait for a batch (at most BLOCK) and apply it."""
        entries = await self._group.next_batch(BATCH, self._settings.block_ms)
        if entries:
            try:
                await self.apply(entries)
            except LinkError:
                self._group.failed()
                raise

    async def apply(self, entries: Sequence[Entry]) -> None:
        """Apply what the batch amounts to, then acknowledge all of it."""
        events = await self._parse(entries)
        news = {to_news(entry_id, event): entry_id for entry_id, event in events.items()}
        order = [news[one] for one in to_apply(news)]
        chosen = await assign_layers(self._cell, [(entry_id, events[entry_id]) for entry_id in order])
        outcomes: list[Applied | None]
        try:
            outcomes = list(await self._cell.apply_events(chosen))
        except ServerError:
            raw = dict(entries)
            outcomes = [await self._apply_alone(entry_id, event, raw[entry_id]) for entry_id, event in chosen]
        applied = set(order)
        await self._group.done([entry_id for entry_id, _ in entries if entry_id not in applied])
        for (entry_id, event), outcome in zip(chosen, outcomes, strict=True):
            if outcome is not None:
                level = logging.INFO if isinstance(event, NodeRegistered) else logging.DEBUG
                extra = {"kind": kind_of(event), "node": event.node, "entry": entry_id, "outcome": outcome.status}
                log.log(level, "node event", extra=extra)

    async def _apply_alone(self, entry_id: str, event: NodeEvent, fields: Fields) -> Applied | None:
        """One event by itself, so that one which the server refuses (a foreign key in its place) costs no neighbour."""
        try:
            return (await self._cell.apply_events([(entry_id, event)]))[0]
        except ServerError as error:
            if error.may_pass:
                raise
            await self._bury(entry_id, f"the server refuses it: {error}", fields)
            return None

    async def _parse(self, entries: Sequence[Entry]) -> dict[str, NodeEvent]:
        """The entries that are ours, by entry id; the others become dead letters."""
        events: dict[str, NodeEvent] = {}
        for entry_id, fields in entries:
            if not fields:
                continue  # pending, but deleted meanwhile: acknowledged with the rest
            try:
                events[entry_id] = parse_event(fields, entry_id)
            except ForeignEntry as reason:
                await self._bury(entry_id, str(reason), fields)
        return events

    async def _bury(self, entry_id: str, reason: str, fields: Fields) -> None:
        log.warning("dead letter", extra={"stream": "nodes", "entry": entry_id, "why": reason})
        await self._cell.dead_letter(self._cell.keys.nodes, entry_id, reason, fields, group=REGISTRY_GROUP)

    async def _age(self, stop: asyncio.Event) -> None:
        """What time does to nodes: silent ones are said to be down, long silent ones are forgotten. Scripts check."""
        settings, cell = self._settings, self._cell
        seconds, micros = await cell.link.send("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        for node, beat_ms in await self._silent(now_ms - settings.node_ttl_ms):
            if beat_ms <= now_ms - settings.node_keep_ms:
                status = (await cell.remove_node(node)).status
                if status in ("applied", "departed"):
                    why = "it said bye" if status == "departed" else "no beat for node_keep_ms"
                    log.info("node forgotten", extra={"node": node, "why": why})
            elif self._said.get(node) != beat_ms:
                self._said[node] = beat_ms
                if await cell.note_silent(node, beat_ms):
                    log.info("node down", extra={"node": node, "why": "no beat for node_ttl_ms"})
        await pause(stop, min(AGE_EVERY_S, settings.node_ttl_ms / 1000))

    async def _silent(self, before_ms: int) -> list[tuple[NodeId, int]]:
        """Known nodes without a beat since then, with the time of their last one. Forgets what it said of others."""
        raw = await self._cell.link.send(
            "ZRANGEBYSCORE", self._cell.keys.nodes_known, "-inf", f"({before_ms}", "WITHSCORES"
        )
        beats = dict(zip(raw[::2], raw[1::2], strict=True))
        ours = await self._cell.members(self._cell.keys.nodes_known, beats, is_node_id, "no node's id")
        silent = [(NodeId(name), _to_ms(beats[name.encode()])) for name in ours]
        self._said = {node: beat_ms for node, beat_ms in silent if self._said.get(node) == beat_ms}
        return silent


def _to_ms(score: bytes) -> int:
    """A time in a zset; anybody may have put an infinite one there."""
    return int(min(max(float(score), 0.0), MOMENT_MAX))
