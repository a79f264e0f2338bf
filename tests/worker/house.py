"""The rest of the house for a worker under test, in one task: registry, dispatcher and sweep, and a plain producer.

It uses the same scripts as the real roles and takes no shortcut; only its choice of nodes is simple (least loaded).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from bus.cell import Cell
from bus.codec.entries import End, Frame, Marker, parse_out
from bus.codec.events import parse_event
from bus.codec.wire import Accepted, Assigned, CellView, Pick, Submission, new_nonce
from bus.ids import JobId, ModelName, NodeId, new_job_id
from bus.jobs import ChatJob, Message
from bus.keys import CellKeys
from bus.link import Link, LinkError, Reader, ServerAddress, to_entry
from bus.process.child import ParentLine
from bus.settings import Settings
from gpu_worker.engine import Engine
from gpu_worker.worker import close_engine, serve
from tests.conftest import wait_until

# Times short enough for a test, long enough for a busy machine.
SETTINGS = Settings().changed(
    engine="echo", lease_ms=1_500, renew_ms=300, self_fence_ms=1_200, unread_ms=1_500, node_ttl_ms=3_000, beat_ms=500,
    block_ms=300,
    breaker_ms=100, sweep_ms=100, backoff_ms=50, alone_ms=3_000, drain_grace_ms=500, capacity=4,
)  # fmt: skip
REPLY = "test"


class Told:
    """What a reader of the out-stream knows of one job. Gaps and divergences are noted, not repaired."""

    def __init__(self) -> None:
        self.text = b""
        self.fence = ""
        self.attempts: list[str] = []  # nodes, in order
        self.ends: list[End] = []
        self.faults: list[str] = []

    def fold(self, entry: Marker | Frame | End) -> None:
        match entry:
            case Marker():
                self.fence = entry.fence
                self.attempts.append(entry.node)
            case Frame() if entry.fence == self.fence:
                known = self.text[entry.offset : entry.offset + len(entry.text)]
                if entry.offset > len(self.text):
                    self.faults.append(f"gap at {len(self.text)}, frame at {entry.offset}")
                elif known != entry.text[: len(known)]:
                    self.faults.append(f"divergence at {entry.offset}: {known!r} {entry.text!r}")
                else:
                    self.text += entry.text[len(self.text) - entry.offset :]
            case End():
                self.ends.append(entry)
            case _:
                pass


class House:
    def __init__(self, url: str, cell: Cell, reader: Reader) -> None:
        self.url = url
        self.cell = cell
        self.told: dict[JobId, Told] = {}
        self.dispatching = True
        self._reader = reader
        self._cursor = "0-0"
        self._run_id = ""
        self._nodes_cursor = "-"

    async def submit(self, prompt: str, *, stream: bool = True, deadline_ms: int = 60_000, **job: Any) -> JobId:
        job_id = new_job_id(0)
        chat = ChatJob(model=ModelName("echo"), messages=(Message("user", prompt),), stream=stream, **job)
        submission = Submission(job_id, chat, out=f"reply:{REPLY}", deadline_in_ms=deadline_ms, est_new=8)
        answer = await self.cell.submit(submission)
        assert isinstance(answer, Accepted), answer
        self.told.setdefault(job_id, Told())
        return job_id

    async def end_of(self, job_id: JobId, timeout_s: float = 10.0) -> End:
        await wait_until(lambda: self.told[job_id].ends, timeout_s)
        return self.told[job_id].ends[0]

    async def ends_of(self, job_ids: list[JobId], timeout_s: float = 10.0) -> list[End]:
        return [await self.end_of(job_id, timeout_s) for job_id in job_ids]

    async def whole_text(self, job_id: JobId) -> bytes:
        """The stored result, which every reader can have."""
        end = await self.end_of(job_id)
        return await self.cell.text(job_id, end.fence)

    async def node(self, name: str) -> Any:
        return await self.cell.node(NodeId(name))

    async def wait_for_node(self, name: str, timeout_s: float = 10.0) -> None:
        async def is_up() -> bool:
            view = await self.cell.node(NodeId(name))
            return view is not None and view.usable(0) and view.leased

        await wait_until(is_up, timeout_s)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._registry))
            group.create_task(self._forever(self._dispatch))
            group.create_task(self._forever(self._sweep))
            group.create_task(self._listen())

    async def _forever(self, step: Any) -> None:
        while True:
            with suppress(LinkError):
                await step()
            await asyncio.sleep(0.02)

    async def _registry(self) -> None:
        raw = await self.cell.link.send("XRANGE", self.cell.keys.nodes, "-", "+")
        events = [(entry_id, parse_event(fields)) for entry_id, fields in map(to_entry, raw)]
        if events:
            await self.cell.apply_events(events)

    async def _dispatch(self) -> None:
        if not self.dispatching:
            return
        view = await self.cell.look()
        nodes = sorted(view.nodes.values(), key=lambda node: node.running / node.capacity)
        await self._assign(view, [node.node for node in nodes if node.usable(view.now_ms)])

    async def assign_to(self, *names: str) -> None:
        """Give all waiting jobs to these nodes, in turn."""
        await self._assign(await self.cell.look(), [NodeId(name) for name in names])

    async def _assign(self, view: CellView, names: list[NodeId]) -> None:
        for queue in view.queues:
            for head in queue.heads if names else ():
                pick = Pick(head.entry_id, head.job_id, head.fence, head.out, tuple(names), new_nonce())
                [answer] = await self.cell.assign(queue.queue, [pick])
                if isinstance(answer, Assigned):
                    names = [*names[1:], names[0]]

    async def _sweep(self) -> None:
        await self.cell.sweep("house")

    async def _listen(self) -> None:
        key = self.cell.keys.reply(REPLY)
        while True:
            batch = await self._reader.xread({key: self._cursor}, count=500, block_ms=100)
            if self._reader.run_id != self._run_id:
                if self._run_id:  # the stream may have gone back: read it from the start, `fold` drops repeats
                    self._cursor, batch = "0-0", []
                self._run_id = self._reader.run_id
            for _, entries in batch:
                for entry_id, fields in entries:
                    self._cursor = entry_id
                    entry = parse_out(fields)
                    assert isinstance(entry, Marker | Frame | End), entry
                    self.told.setdefault(entry.job_id, Told()).fold(entry)


@asynccontextmanager
async def open_house(url: str, settings: Settings = SETTINGS) -> AsyncIterator[House]:
    address = ServerAddress.parse(url)
    link = await Link.connect(address, name="house", cell_key=CellKeys(0).leases)
    async with link, Reader(address, name="house reads") as reader:
        house = House(url, Cell(link, 0, settings), reader)
        running = asyncio.create_task(house.run())
        try:
            yield house
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


@asynccontextmanager
async def serving(house: House, settings: Settings, engine: Engine) -> AsyncIterator[None]:
    """A worker with this engine in this process; drained when the block is left."""
    parent = ParentLine()
    info = await engine.start()
    running = asyncio.create_task(serve(settings, parent, ServerAddress.parse(settings.redis_url), engine, info))
    try:
        await house.wait_for_node(settings.node_id)
        yield
        parent.stop.set()
        await asyncio.wait_for(asyncio.shield(running), 10)
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=5)
        await close_engine(engine)
