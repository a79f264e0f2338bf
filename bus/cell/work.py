"""Calls of a worker on the attempts it holds: flush, finish, requeue. One script a method; see docs/protocol.md."""

from collections.abc import Sequence
from typing import Any

from bus.cell.base import TEXT_IN_END_MAX, CellBase, epoch_of, raise_if_superseded, to_requeued
from bus.codec.wire import (
    Ended,
    Finished,
    FinishPiece,
    FinishReply,
    FlushPiece,
    FlushReply,
    Gap,
    Largest,
    Moved,
    NotYours,
    Requeued,
    RequeueWhy,
    Stop,
    Stored,
    parse_route,
)
from bus.ids import Fence, Holder, JobId, NodeId
from bus.jobs import Capability


class WorkCalls(CellBase):
    async def flush(self, holder: Holder, node: NodeId, pieces: Sequence[FlushPiece]) -> list[FlushReply]:
        """Store and send what all sequences of one node produced; answers in their order.

        Raises Superseded if another holder owns the node (nothing was written).
        """
        keys, settings = self.keys, self.settings
        names = [keys.node(node), keys.node_running(node)]
        args: list[str | bytes | int] = [
            *(holder, epoch_of(holder), settings.lease_ms, settings.out_ttl_ms, settings.job_keep_ms),
            *(settings.node_keep_ms, len(pieces)),
        ]
        for p in pieces:
            names += (keys.job(p.job_id), keys.text(p.job_id, p.fence), keys.tokens(p.job_id, p.fence))
            names.append(keys.out(p.route.out))
            args += (p.job_id, p.fence, p.route.encode(), p.text_offset, p.text, p.token_offset, p.tokens)
        self._add_logprobs(pieces, names, args)
        answers = await self._call("flush", names, args)
        raise_if_superseded(node, holder, answers)
        return [_to_flushed(answer) for answer in answers]

    async def finish(self, holder: Holder, node: NodeId, pieces: Sequence[FinishPiece]) -> list[FinishReply]:
        """End attempts, each with the one terminal; frees the slots, acks and deletes the node entries.

        `Gap`: text is missing before this piece's offset; send it all from text_len on. Raises Superseded.
        A node's error is not for `finish` but for `requeue(..., "node_error")`.
        """
        keys, settings = self.keys, self.settings
        names = [keys.node(node), keys.node_running(node), keys.node_load(node), keys.node_jobs(node)]
        names += (keys.deadlines, keys.wake)
        args: list[str | bytes | int] = [
            *(holder, epoch_of(holder), keys.prefix, settings.out_ttl_ms, settings.result_ttl_ms),
            *(settings.node_keep_ms, TEXT_IN_END_MAX, len(pieces), node),
        ]
        for p in pieces:
            out, gateway_jobs, usage, quota = self._route_keys(p.job_id, p.route)
            names += (keys.job(p.job_id), keys.text(p.job_id, p.fence), keys.tokens(p.job_id, p.fence))
            names += (keys.payload(p.job_id), out, gateway_jobs, usage, quota)
            args += (p.job_id, p.fence, p.route.encode(), p.text_offset, p.text, p.reason, p.prompt_tokens)
            args += (p.new_tokens, p.error_code, p.error_message, p.fault)
        self._add_logprobs(pieces, names, args)
        answers = await self._call("finish", names, args)
        raise_if_superseded(node, holder, answers)
        return [_to_finished(answer) for answer in answers]

    def _add_logprobs(
        self, pieces: Sequence[FlushPiece | FinishPiece], names: list[str], args: list[str | bytes | int]
    ) -> None:
        """Behind all pieces, so that those which bring none pay nothing."""
        for at, p in enumerate(pieces, 1):
            if p.logprobs is not None:
                names.append(self.keys.logprobs(p.job_id, p.fence))
                args += (at, p.logprobs_offset, p.logprobs)

    async def requeue(
        self, job_id: JobId, fence: Fence, why: RequeueWhy, detail: str = "", lacks: Capability | None = None
    ) -> Requeued | Ended | NotYours:
        """Hand a running attempt back by the rules of design 3.3 (counts, alone, avoid list, back-off, dead letter).

        A cancelled or late job ends instead. `detail` goes to the log, the events and the final error message.
        lacks: what the node of an `unable` can do for no job, so that others of this kind need not try it.
        """
        return await self._requeue(job_id, fence, why, detail, lacks or "")

    async def outgrow(
        self, job_id: JobId, fence: Fence, context: int, detail: str = ""
    ) -> Requeued | Ended | NotYours | Largest:
        """The job does not fit in the node's context: to a node with a larger one, with all that is stored of it.

        context: tokens, 0 if the node does not say. `Largest`: there is no such node; end it as you would alone.
        """
        answer = await self._call_requeue(job_id, fence, "outgrown", detail, context=context)
        return Largest(job_id) if answer[0] == b"largest" else to_requeued(job_id, answer)

    async def hand_back(self, job_id: JobId, fence: Fence, entry_owner: Holder) -> Requeued | Ended | NotYours:
        """A worker read an entry addressed to another owner: requeue it as `unread`."""
        return await self._requeue(job_id, fence, "unread", f"addressed to {entry_owner}")


def _to_flushed(answer: list[Any]) -> FlushReply:
    match answer[0]:
        case 1:
            return Stored(answer[1], answer[2])
        case 2:
            return Gap(*answer[1:])
        case 3:
            return Stop(answer[1].decode())
        case _:
            return Moved(parse_route(answer[1].decode()))


def _to_finished(answer: list[Any]) -> FinishReply:
    match answer[0]:
        case 1:
            return Finished(answer[1].decode())
        case 2:
            return Gap(*answer[1:])
        case 3:
            return Stop(answer[1].decode())
        case _:
            return Moved(parse_route(answer[1].decode()))
