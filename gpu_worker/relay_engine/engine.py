"""`Engine` over one HTTP node: each sequence is one bounded call, and every end says whose fault it was."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import aiohttp
import msgspec

from bus.ids import JobId, NodeId
from bus.jobs import Capability
from gpu_worker.engine import End, EngineInfo, EngineLoad, GenerateRequest, Piece, SequenceId
from gpu_worker.relay_engine.call import NodeCalls, RelayLimits
from gpu_worker.relay_engine.faults import CallFailed, NoLogprobs, no_logprobs
from gpu_worker.relay_engine.meter import Meter
from gpu_worker.relay_engine.outbox import Outbox
from gpu_worker.relay_engine.refusals import Refusals
from gpu_worker.relay_engine.speaker import NodeSpeaker
from gpu_worker.relay_engine.tally import tokens_of

log = logging.getLogger(__name__)


class RelayNode(msgspec.Struct, frozen=True):
    """An HTTP node as it is registered."""

    id: NodeId
    api_url: str
    models: tuple[str, ...]
    capacity: int  # max_concurrency
    layers: tuple[int, ...] = ()


class _Active:
    """One sequence between submit and its end; the `Listener` of its call."""

    def __init__(self, request: GenerateRequest, outbox: Outbox, scored: Callable[[], None]) -> None:
        self.request = request
        self.offset = len(request.forced_text)  # of the next byte that the service gets
        self.task: asyncio.Task[End] | None = None
        self.cancelled = False
        self.calling = False
        self._outbox = outbox
        self._scored = scored

    @property
    def published(self) -> int:
        return self.offset - len(self.request.forced_text)

    def publish(self, text: bytes, logprobs: bytes = b"") -> None:
        if text or logprobs:
            self._outbox.add(self.request.sequence, self.offset, text, logprobs=logprobs)
            self.offset += len(text)

    def scored(self) -> None:
        self._scored()

    async def room(self) -> None:
        await self._outbox.room(self.request.sequence)


class RelayEngine:
    """Implements `gpu_worker.engine.Engine`. The session is shared by all nodes of a relay and closed by its owner."""

    def __init__(self, node: RelayNode, session: aiohttp.ClientSession, limits: RelayLimits) -> None:
        self._node = node
        self._outbox = Outbox()
        self._meter = Meter()
        self._refusals = Refusals()
        self._scores = False  # it has given log probabilities since it was taken
        self._speaker = NodeSpeaker(node.id, node.api_url, NodeCalls(session, limits), self._meter)
        self._slots = asyncio.Semaphore(node.capacity)
        self._active: dict[SequenceId, _Active] = {}
        self._group: asyncio.TaskGroup | None = None
        self._owner: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def start(self) -> EngineInfo:
        """Calls nobody: a node that is down must still have an owner, who says so for its jobs."""
        opened = asyncio.Event()
        self._owner = asyncio.create_task(self._own_tasks(opened), name=f"relay {self._node.id}")
        await opened.wait()
        return EngineInfo(
            kind="http",
            models=self._node.models,
            context_length=0,  # the node knows; it refuses what is too long
            capacity=self._node.capacity,
            layers=self._node.layers,
        )

    def submit(self, request: GenerateRequest) -> None:
        assert self._group is not None, "start() first"
        assert request.sequence not in self._active, request.sequence
        active = _Active(request, self._outbox, self._gives_logprobs)
        self._active[request.sequence] = active
        active.task = self._group.create_task(self._serve(active), name=f"relay call {request.sequence}")
        # Not at the end of _serve: a task that is cancelled before its first step never enters its body.
        active.task.add_done_callback(lambda task: self._end(active, task))

    def cancel(self, sequence: SequenceId) -> None:
        active = self._active.get(sequence)
        if active is not None and active.task is not None and not active.cancelled:
            active.cancelled = True
            active.task.cancel()

    def batches(self) -> AsyncIterator[Sequence[Piece]]:
        return self._outbox.batches()

    def load(self) -> EngineLoad:
        """Also called from the lease thread, hence the copy."""
        active = list(self._active.values())
        running = sum(one.calling for one in active)
        return EngineLoad(
            prefill_rate=self._meter.prefill_rate,
            decode_rate=self._meter.decode_rate,
            capacity=self._node.capacity,
            running=running,
            waiting=len(active) - running,
            idle=not active,
            # Each call is bounded by itself and ends in an error, so a deaf node never makes a deaf relay.
            last_progress_s=time.monotonic(),
        )

    async def close(self) -> None:
        """Breaks off what still runs, without an end: the service has drained, or it is fenced."""
        self._closing.set()
        if self._owner is not None:
            await self._owner
        self._outbox.close()

    async def _own_tasks(self, opened: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            opened.set()
            await self._closing.wait()
            for active in self._active.values():
                if active.task is not None:
                    active.task.cancel()

    async def _serve(self, active: _Active) -> End:
        """Run one sequence to its one End."""
        try:
            async with self._slots:
                active.calling = True
                end = await self._speaker.answer(active.request, active)
                self._refusals.answer()
                return end
        except CallFailed as caught:
            if active.request.job.logprobs is not None and (refusal := no_logprobs(caught)) is not None:
                return self._unable(active, refusal)
            failure = self._judge(active, caught)
            if failure.fault == "node":
                self._speaker.forget()
            return self._failed(active, failure)
        except Exception:  # a bug in here must end one job, not all jobs of the node
            log.exception("relay call failed", extra={"node": self._node.id, "sequence": active.request.sequence})
            return self._failed(active, CallFailed("node_error", "the relay failed on the answer of this node"))

    def _judge(self, active: _Active, failure: CallFailed) -> CallFailed:
        """The same, or the node's fault where the client was blamed by a node that refuses everything."""
        if failure.fault != "client" or failure.code == "context_length_exceeded":
            return failure
        if not self._refusals.refuse(JobId(active.request.sequence.partition("/")[0])):
            return failure
        return CallFailed("node_error", f"the node refused the request: {failure.message}", status=failure.status)

    def _gives_logprobs(self) -> None:
        self._scores = True

    def _unable(self, active: _Active, refusal: NoLogprobs) -> End:
        """One that refuses in words may mind this request only, and one that gave some before is right for others."""
        lacks: Capability | None = None if self._scores or refusal.status else "logprobs"
        return msgspec.structs.replace(self._failed(active, refusal), unable=True, lacks=lacks)

    def _failed(self, active: _Active, failure: CallFailed) -> End:
        log.info(
            "relay call ended in an error",
            extra={
                "node": self._node.id,
                "sequence": active.request.sequence,
                "code": failure.code,
                "fault": failure.fault,
                "reason": failure.message,
            },
        )
        return End(
            "error",
            new_tokens=tokens_of(active.offset),
            error_code=failure.code,
            error_message=failure.message,
            fault=failure.fault,
            outgrown=failure.code == "context_length_exceeded",
        )

    def _end(self, active: _Active, task: asyncio.Task[End]) -> None:
        self._active.pop(active.request.sequence, None)
        if not self._active:
            self._meter.idle()
        if not task.cancelled():
            self._outbox.add(active.request.sequence, active.offset, b"", task.result())
        elif active.cancelled:
            end = End("cancelled", new_tokens=tokens_of(active.offset))
            self._outbox.add(active.request.sequence, active.offset, b"", end)
