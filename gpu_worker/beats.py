"""Beats of a worker's node: full state, so that any one of them recreates the node after a FLUSHALL."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from bus.cell import Cell
from bus.codec.events import NodeBeat
from bus.codec.fields import COUNT_MAX
from bus.codec.wire import Owned
from bus.ids import NodeId
from bus.link import LinkError
from gpu_worker.engine import EngineInfo, EngineLoad
from gpu_worker.loop_lag import LoopLag

LOOK_S = 1.0  # how often the load is compared with what was told
RATE_LEAST = 0.1
RATE_NEWS = 0.25  # a rate that changed by more is worth a beat of its own

log = logging.getLogger(__name__)


def make_beat(
    owned: Owned,
    info: EngineInfo,
    load: EngineLoad,
    *,
    draining: bool = False,
    version: str = "",
    layer_count: int = 0,
    gpu_memory_gb: float = 0.0,
    lag: LoopLag | None = None,
) -> NodeBeat:
    assert info.kind != "http", "HTTP nodes beat for themselves"
    return NodeBeat(
        node=owned.node,
        epoch=owned.epoch,
        holder=owned.holder,
        kind=info.kind,
        models=info.models,
        capacity=load.capacity,
        layers=info.layers,
        layer_count=layer_count or len(info.layers),
        context_length=info.context_length,
        resume=info.resume_digest,
        prefill_rate=to_rate(load.prefill_rate),
        decode_rate=to_rate(load.decode_rate),
        running=load.running,
        waiting=load.waiting,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        drafted=load.drafted,
        accepted=load.accepted,
        loop_lag_ms=round(lag.p99_ms, 1) if lag else 0.0,
        loop_lag_max_ms=round(lag.max_ms, 1) if lag else 0.0,
        gpu_memory_gb=gpu_memory_gb,
        version=version,
        draining=draining,
        can=info.can,
    )


def to_rate(measured: float) -> float:
    """What the dispatcher may divide by. 0 says: not measured; so does what is no number, instead of a dead letter.

    Never rounded to 0: a very slow node is not an unknown one.
    """
    if not 0.0 < measured < math.inf:
        return 0.0
    return min(COUNT_MAX, max(RATE_LEAST, round(measured, 1)))


def is_news(told: NodeBeat, now: NodeBeat) -> bool:
    """Whether the dispatcher or an operator should know before the next regular beat."""
    if (told.capacity, told.draining, told.models) != (now.capacity, now.draining, now.models):
        return True
    if (told.running == 0) != (now.running == 0):
        return True
    return _differs(told.prefill_rate, now.prefill_rate) or _differs(told.decode_rate, now.decode_rate)


def _differs(before: float, after: float) -> bool:
    return abs(after - before) > RATE_NEWS * max(abs(before), 1e-9)


def rest_s(now_s: float, told_s: float, beat_s: float) -> float:
    """Until the next look: no later than the next beat is due. One that is due was not sent: not again at once.

    A timer may end a hair early; a beat that would then wait for the look after it would come a whole look late.
    """
    due_s = told_s + beat_s
    return min(LOOK_S, due_s - now_s if due_s > now_s else beat_s)


class Beater:
    """Publishes the node's state every `beat_ms`, sooner on news, and at once when nudged."""

    def __init__(self, cell: Cell, node: NodeId, describe: Callable[[], NodeBeat], beat_s: float) -> None:
        self._cell = cell
        self._node = node
        self._describe = describe
        self._beat_s = beat_s
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Beat now: after a reconnect the server may know nothing of us."""
        self._nudged.set()

    async def run(self) -> None:
        """Until cancelled. A server that cannot be reached is tried again at the next look."""
        told: NodeBeat | None = None
        told_s = 0.0
        while True:
            now_s = time.monotonic()
            beat = self._describe()
            if told is None or self._nudged.is_set() or now_s - told_s >= self._beat_s or is_news(told, beat):
                self._nudged.clear()
                try:
                    await self._cell.publish_node_event(beat)
                    told, told_s = beat, now_s
                except LinkError as error:
                    log.warning("beat not sent", extra={"node": self._node, "error": str(error)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s(time.monotonic(), told_s, self._beat_s)):
                    await self._nudged.wait()
