"""A dispatcher and a worker driven by hand, step by step, over a real server: the caller's counterpart in tests."""

import asyncio

from msgspec.structs import replace

from bus.calls.handle import HandleEvent, JobHandle, TextDelta
from bus.cell import Cell
from bus.codec.entries import Assignment, parse_assignment
from bus.codec.events import NodeBeat
from bus.codec.wire import Assigned, FinishPiece, FinishReply, FlushPiece, FlushReply, Moved, Owned, Pick, new_nonce
from bus.ids import Fence, Holder, JobId, ModelName, NodeId
from bus.jobs import ChatJob, Message
from bus.keys import WORKERS_GROUP
from bus.link import Link, Reader, ServerAddress
from bus.settings import Settings

MODEL = "echo"
SETTINGS = Settings().changed(
    model=MODEL, lease_ms=1_500, renew_ms=300, self_fence_ms=1_200, silence_ms=400, block_ms=200, client_grace_ms=200
)


def chat(*, stream: bool = True, model: str = MODEL) -> ChatJob:
    return ChatJob(model=ModelName(model), messages=(Message("user", "hello"),), max_tokens=20, stream=stream)


class Stage:
    """One node of one model. `give` plays the dispatcher, `say` and `end` the worker."""

    def __init__(self, cell: Cell, reader: Reader, node: NodeId, holder: Holder) -> None:
        self.cell = cell
        self.node = node
        self.holder = holder
        self._reader = reader

    @classmethod
    async def open(cls, address: ServerAddress, link: Link, node: str = "n1") -> "Stage":
        cell = Cell(link, 0, SETTINGS)
        stage = cls(cell, Reader(address, name="stage"), NodeId(node), Holder(""))
        await stage.rise()
        return stage

    async def rise(self) -> None:
        """The node registers, as at a worker's boot, also after a FLUSHALL."""
        if self.holder:
            await self.cell.drop_lease(self.holder)
        owned = await self.cell.own(self.node, self.node)
        assert isinstance(owned, Owned)
        self.holder = owned.holder
        beat = NodeBeat(
            node=self.node, epoch=owned.epoch, holder=owned.holder, kind="echo", models=(MODEL,), capacity=8, resume="d"
        )
        entry_id = await self.cell.publish_node_event(beat)
        await self.cell.apply_events([(entry_id, beat)])

    async def give(self, job_id: JobId) -> Assignment:
        """Assign the queued job to the node, and read it from the node's stream."""
        await self.cell.lease(self.holder)
        view = await self.cell.look()
        queue, head = next((one.queue, head) for one in view.queues for head in one.heads if head.job_id == job_id)
        pick = Pick(head.entry_id, job_id, head.fence, head.out, (self.node,), new_nonce())
        [answer] = await self.cell.assign(queue, [pick])
        assert isinstance(answer, Assigned), answer
        while True:
            key = self.cell.keys.node_jobs(self.node)
            batch = await self._reader.xreadgroup(WORKERS_GROUP, self.holder, {key: ">"}, count=8, block_ms=500)
            for _, entries in batch:
                for entry_id, fields in entries:
                    assignment = parse_assignment(entry_id, fields)
                    if assignment.job_id == job_id:
                        return assignment

    async def say(self, work: Assignment, offset: int, text: str, tokens: bytes = b"") -> FlushReply:
        """One flush; goes where the job's stream has moved to, as a worker does."""
        piece = FlushPiece(
            job_id=work.job_id, fence=work.fence, route=work.route, text_offset=offset, text=text.encode(),
            token_offset=0, tokens=tokens,
        )  # fmt: skip
        [reply] = await self.cell.flush(self.holder, self.node, [piece])
        if isinstance(reply, Moved):
            [reply] = await self.cell.flush(self.holder, self.node, [replace(piece, route=reply.route)])
        return reply

    async def end(self, work: Assignment, offset: int, text: str = "") -> FinishReply:
        piece = FinishPiece(
            job_id=work.job_id, fence=work.fence, route=work.route, text_offset=offset, text=text.encode(),
            reason="stop", prompt_tokens=3, new_tokens=5,
        )  # fmt: skip
        [reply] = await self.cell.finish(self.holder, self.node, [piece])
        if isinstance(reply, Moved):
            [reply] = await self.cell.finish(self.holder, self.node, [replace(piece, route=reply.route)])
        return reply

    async def crash(self, work: Assignment) -> None:
        await self.cell.requeue(work.job_id, Fence(work.fence), "crash", "killed by the test")

    async def close(self) -> None:
        await self._reader.close()


async def text_of(handle: JobHandle) -> tuple[str, HandleEvent]:
    """Everything until the end; offsets are checked on the way."""
    text = b""
    async with asyncio.timeout(10):
        async for event in handle:
            if isinstance(event, TextDelta):
                assert event.offset == len(text)
                text += event.text
            else:
                return text.decode(), event
    raise AssertionError("no end")


async def next_text(handle: JobHandle) -> str:
    event = await handle.next(5)
    assert isinstance(event, TextDelta), event
    return event.text.decode()


async def text_of_rest(handle: JobHandle) -> tuple[str, HandleEvent]:
    text = b""
    async with asyncio.timeout(10):
        async for event in handle:
            if not isinstance(event, TextDelta):
                return text.decode(), event
            text += event.text
    raise AssertionError("no end")


async def state_is(stage: Stage, handle: JobHandle, state: str) -> bool:
    record = await stage.cell.job(handle.job_id)
    return record is not None and record.state == state
