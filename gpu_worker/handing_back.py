"""Jobs that leave a worker without an end: handed back, or gone on to a node with a larger context.

    hand_back   the job is given up here at once; it stays listed until the server knows, so that nobody counts a crash
    offer       its answer is there as far as this node's context goes: once all of that is stored the server is asked
                for a node with a larger one. If there is none, it ends here, as it would have alone

Both are one script call that is safe to repeat: a lost reply is asked for again, and who has the job by then is known.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from bus.cell import Cell
from bus.codec.wire import Largest, NotYours, RequeueWhy
from bus.ids import Fence, JobId
from bus.jobs import Capability
from bus.link import LinkError
from gpu_worker.publisher import Held, Publisher

HAND_BACK_TRIES = 5

log = logging.getLogger(__name__)


class HandingBack:
    def __init__(
        self,
        cell: Cell,
        publisher: Publisher,
        *,
        context_length: int,
        retry_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        put_away: Callable[[str, str], Awaitable[None]],
        on_ended: Callable[[], None],
    ) -> None:
        """context_length: of the node, 0 = it does not say. put_away: an entry behind which no attempt of ours stands.
        on_ended: an offered job ends here, and its finish is to be sent."""
        self._cell = cell
        self._publisher = publisher
        self._context_length = context_length
        self._retry_s = retry_s
        self._spawn = spawn
        self._put_away = put_away
        self._on_ended = on_ended
        self._returning: dict[str, Held] = {}  # handed back, not yet answered

    def __bool__(self) -> bool:
        return bool(self._returning)

    def __contains__(self, sequence: str) -> bool:
        return sequence in self._returning

    def listed(self) -> list[tuple[JobId, Fence]]:
        """Safe from another thread (one atomic copy)."""
        return [(held.job_id, held.fence) for held in list(self._returning.values())]

    def hand_back(self, held: Held, why: RequeueWhy, detail: str, lacks: Capability | None = None) -> None:
        self._publisher.drop(held.sequence)
        self._returning[held.sequence] = held
        self._spawn(self._requeue(held, why, detail, lacks))

    def offer_stored(self) -> None:
        """Ask for every job that outgrew this node and is stored as far as it goes."""
        for held in self._publisher.take_outgrown():
            self._spawn(self._offer(held))

    async def _requeue(self, held: Held, why: RequeueWhy, detail: str, lacks: Capability | None) -> None:
        try:
            for _ in range(HAND_BACK_TRIES):
                try:
                    outcome = await self._cell.requeue(held.job_id, held.fence, why, detail, lacks)
                except LinkError as error:
                    log.warning("job not handed back yet", extra={"job": held.job_id, "error": str(error)})
                    await asyncio.sleep(self._retry_s)
                    continue
                if isinstance(outcome, NotYours):
                    await self._put_away(held.entry_id, f"{held.sequence} is no attempt of this node")
                else:
                    _log_handed_back(held, why, detail)
                return
        finally:
            self._returning.pop(held.sequence, None)

    async def _offer(self, held: Held) -> None:
        """Until it is answered, or the job is no longer ours: a renewal says so of one that ended meanwhile."""
        assert held.outgrown is not None
        detail = held.outgrown.error_message or f"{self._context_length} tokens are full"
        while self._publisher.get(held.sequence) is held:
            try:
                outcome = await self._cell.outgrow(held.job_id, held.fence, self._context_length, detail)
            except LinkError as error:
                log.warning("job not offered yet", extra={"job": held.job_id, "error": str(error)})
                await asyncio.sleep(self._retry_s)
                continue
            if self._publisher.get(held.sequence) is not held:
                return
            if isinstance(outcome, Largest):
                self._publisher.end_outgrown(held)
                self._on_ended()
                return
            self._publisher.drop(held.sequence)
            if isinstance(outcome, NotYours):
                await self._put_away(held.entry_id, f"{held.sequence} is no attempt of this node")
            else:
                _log_handed_back(held, "outgrown", detail)


def _log_handed_back(held: Held, why: str, detail: str) -> None:
    log.info("job handed back", extra={"job": held.job_id, "fence": held.fence, "why": why, "detail": detail})
