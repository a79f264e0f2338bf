"""Calls on jobs: submit, look, assign, and what gateways ask. One method a script; see docs/protocol.md."""

from collections.abc import Sequence

from bus.cell_base import CellBase
from bus.entries import Fields
from bus.ids import Fence, GatewayId, Holder, JobId, NodeId
from bus.keys import QueueName
from bus.wire import (
    Accepted,
    Assigned,
    Attached,
    CancelResult,
    CellView,
    Ended,
    FinishPiece,
    FinishReply,
    FlushPiece,
    FlushReply,
    JobRecord,
    NotAssigned,
    NotYours,
    Pick,
    Refused,
    Requeued,
    RequeueWhy,
    Submission,
    Unknown,
)


class JobCalls(CellBase):
    async def submit(self, submission: Submission) -> Accepted | Refused:
        """Create the job, or find it: the same id again answers the existing job (`existing=True`).

        With an idem_key the record is fixed first (SET NX): if it names another id, that job is submitted or found
        instead (its id is in the answer), and another body is refused as `idem_conflict`. A refused submit deletes
        its record. OOM of the server is `Refused("memory_full")`. Raises LinkDown, ServerError; safe to repeat.
        """
        raise NotImplementedError

    async def admit(self, entry_id: str, submission: Submission) -> Accepted | Refused | None:
        """Submit for a plain producer: acks and deletes the entry of `jobs` in the same script.

        A refusal or a duplicate is answered on the reply stream. None: the entry was gone, nothing was done.
        """
        raise NotImplementedError

    async def reject(self, entry_id: str, code: str, message: str, out: str, job_id: JobId, fields: Fields) -> bool:
        """The other end of an entry of `jobs`: dead letter, `type=end` with the error on `out` (if any), ack, delete.

        False: the entry was gone, nothing was done."""
        raise NotImplementedError

    async def look(self, queues: Sequence[QueueName] = (), heads: int = 64) -> CellView:
        """The first `heads` entries of each queue and every known node of their models; no queue named = all.

        Entries that are not ours are dead-lettered and deleted on the way. Reads only, otherwise.
        """
        raise NotImplementedError

    async def assign(self, queue: QueueName, picks: Sequence[Pick]) -> list[Assigned | NotAssigned]:
        """Verify and reserve, up to 64 picks of one queue, answers in their order (longer lists are cut in calls).

        The first named node that is alive, leased, not draining, not avoided (unless all live nodes of the model
        are), serves the model, is not kept for another job, has a closed breaker (or a free probe) and has room gets the job.
        """
        raise NotImplementedError

    async def flush(self, holder: Holder, node: NodeId, pieces: Sequence[FlushPiece]) -> list[FlushReply]:
        """Store and send what all sequences of one node produced; answers in their order.

        Raises Superseded if another holder owns the node (nothing was written).
        """
        raise NotImplementedError

    async def finish(self, holder: Holder, node: NodeId, pieces: Sequence[FinishPiece]) -> list[FinishReply]:
        """End attempts, each with the one terminal; frees the slots, acks and deletes the node entries.

        `Gap`: text is missing before this piece's offset; send it all from text_len on. Raises Superseded.
        A node's error is not for `finish` but for `requeue(..., "node_error")`.
        """
        raise NotImplementedError

    async def requeue(
        self, job_id: JobId, fence: Fence, why: RequeueWhy, detail: str = ""
    ) -> Requeued | Ended | NotYours:
        """Hand a running attempt back by the rules of design 3.3 (counts, alone, avoid list, back-off, dead letter).

        A cancelled or late job ends instead. `detail` goes to the log, the events and the final error message.
        """
        raise NotImplementedError

    async def cancel(self, job_id: JobId, by: str, only_gateway: GatewayId | None = None) -> CancelResult:
        """queued -> cancelled at once; running -> the worker is told. With `only_gateway` (client gone): WrongGateway
        if another gateway has the job now. NotYours(state="unknown") if there is no such job."""
        raise NotImplementedError

    async def attach(self, job_id: JobId, gateway: GatewayId, out: str) -> Attached | JobRecord | Unknown:
        """Take the stream over: further entries go to `out`, the old out-stream gets `detached`.

        A job that has ended answers its record; its text is read with `text(job_id, record.fence, ...)`.
        """
        raise NotImplementedError

    async def job(self, job_id: JobId) -> JobRecord | None: ...

    async def text(self, job_id: JobId, fence: Fence, start: int = 0, end: int | None = None) -> bytes:
        """Stored answer bytes start..end (exclusive); shorter or empty if not there."""
        raise NotImplementedError

    async def tokens(self, job_id: JobId, fence: Fence) -> tuple[int, ...]:
        """Stored token ids of the attempt; empty once the job has ended."""
        raise NotImplementedError

    async def payload(self, job_id: JobId) -> bytes | None:
        """msgpack of the ChatJob (bus.jobs.decode_job); None once the job has ended or is gone."""
        raise NotImplementedError

    async def rate(self, address: str, per_minute: int) -> int:
        """Take one request of the address' allowance: 0 = allowed, else ms to wait. per_minute 0 = no limit."""
        raise NotImplementedError

    async def dead_letter(self, source: str, entry_id: str, reason: str, fields: Fields, *, group: str = "") -> None:
        """Put a foreign entry away: one entry in `dead`; acked (if a group is named) and deleted at `source` (a key)."""
        raise NotImplementedError
