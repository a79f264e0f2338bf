"""A node driven by hand: owns, beats, takes and ends jobs through the scripts, so that a test decides each moment."""

from collections.abc import Sequence
from typing import Any

import msgspec

from bus.cell import Cell
from bus.codec.entries import Assignment, parse_assignment
from bus.codec.events import NodeBeat
from bus.codec.wire import Accepted, FinishPiece, FinishReply, Owned, Submission
from bus.ids import Holder, JobId, ModelName, NodeId
from bus.jobs import ChatJob
from bus.keys import WORKERS_GROUP
from bus.link import ServerError, to_batch

MODEL = "m"


class HandNode:
    """One node of a cell. Its lease is as long as the settings say: nothing is renewed by itself."""

    def __init__(self, cell: Cell, name: str, holder: Holder, epoch: int) -> None:
        self.cell = cell
        self.node = NodeId(name)
        self.holder = holder
        self.epoch = epoch

    @classmethod
    async def join(
        cls, cell: Cell, name: str, *, capacity: int = 4, models: Sequence[str] = (MODEL,), **more: Any
    ) -> "HandNode":
        owned = await cell.own(NodeId(name), name)
        assert isinstance(owned, Owned)
        node = cls(cell, name, owned.holder, owned.epoch)
        await node.beat(capacity=capacity, models=models, **more)
        return node

    async def beat(self, *, capacity: int = 4, models: Sequence[str] = (MODEL,), **more: Any) -> None:
        """A beat, applied at once: the registry's part done by hand."""
        beat = NodeBeat(
            node=self.node,
            epoch=self.epoch,
            holder=self.holder,
            kind="echo",
            models=tuple(models),
            capacity=capacity,
            prefill_rate=1_000.0,
            decode_rate=100.0,
            **more,
        )
        entry_id = await self.cell.publish_node_event(beat)
        (applied,) = await self.cell.apply_events([(entry_id, beat)])
        assert applied.status == "applied"

    async def take(self, count: int = 100) -> list[Assignment]:
        """What has been assigned since the last call, oldest first."""
        key = self.cell.keys.node_jobs(self.node)
        try:
            await self.cell.link.send("XGROUP", "CREATE", key, WORKERS_GROUP, "0", "MKSTREAM")
        except ServerError as error:
            if error.code != "BUSYGROUP":
                raise
        reply = await self.cell.link.send(
            "XREADGROUP", "GROUP", WORKERS_GROUP, self.holder, "COUNT", count, "STREAMS", key, ">"
        )
        return [parse_assignment(entry_id, fields) for _, batch in to_batch(reply) for entry_id, fields in batch]

    async def finish(self, work: Sequence[Assignment], text: bytes = b"ok") -> list[FinishReply]:
        pieces = [FinishPiece(one.job_id, one.fence, one.route, one.text_len, text, "stop", 3, 1) for one in work]
        return await self.cell.finish(self.holder, self.node, pieces)

    async def running(self) -> int:
        return int(await self.cell.link.send("ZCARD", self.cell.keys.node_running(self.node)))


def submission(name: str, *, model: str = MODEL, cell: int = 0, **fields: Any) -> Submission:
    job = ChatJob(model=ModelName(model), prompt="Hello", max_tokens=16)
    plain = Submission(job_id=JobId(f"c{cell}-{name}"), job=job, out="gateway:g1", est_prompt=10, est_new=16)
    return msgspec.structs.replace(plain, **fields)


async def submit(cell: Cell, *names: str, **fields: Any) -> None:
    for name in names:
        accepted = await cell.submit(submission(name, **fields))
        assert isinstance(accepted, Accepted), accepted
