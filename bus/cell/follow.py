"""Calls on jobs from the side of those who wait for them: cancel, attach, and what is stored. See docs/protocol.md."""

from collections.abc import Mapping

from bus.cell.base import CHANGE_TRIES_MAX, CellBase
from bus.codec.spec import parse_spec
from bus.codec.wire import (
    Attached,
    Cancelling,
    CancelResult,
    Ended,
    JobRecord,
    NotYours,
    Policy,
    Route,
    Unknown,
    WrongGateway,
    parse_route,
    unpack_tokens,
)
from bus.ids import Fence, GatewayId, JobId

RECORD_FIELDS = (
    *("state", "fence", "route", "place", "spec", "result", "started", "cancel", "crashes", "node_errors"),
    *("relay_losses", "avoid", "alone", "error_code", "error_message", "score"),
)


class FollowCalls(CellBase):
    async def cancel(self, job_id: JobId, by: str, only_gateway: GatewayId | None = None) -> CancelResult:
        """queued -> cancelled at once; running -> the worker is told. With `only_gateway` (client gone): WrongGateway
        if another gateway has the job now. NotYours(state="unknown") if there is no such job."""
        return await self._cancel(job_id, by, only_gateway or "", lapsed=False)

    async def attach(self, job_id: JobId, gateway: GatewayId, out: str) -> Attached | JobRecord | Unknown:
        """Take the stream over: further entries go to `out`, the old out-stream gets `detached`. From here on the job
        streams, also if its first caller wanted the whole.

        A job that has ended answers its record; its text is read with `text(job_id, record.fence, ...)`. So does one of
        a plain producer, whose stream stays his: follow it by its record and its stored text.
        """
        keys, own = self.keys, self.keys.job(job_id)
        for _ in range(CHANGE_TRIES_MAX):
            place = await self._place(job_id)
            if place is None:
                return Unknown(job_id)
            old = place.route
            new = Route(out=out, gateway=gateway, address=old.address, key_id=old.key_id)
            answer = await self._call(
                "attach",
                [
                    *(own, keys.out(out), keys.gateway_jobs(gateway), keys.out(old.out)),
                    keys.gateway_jobs(old.gateway) if old.gateway else own,
                    *(keys.text(job_id, place.fence), keys.tokens(job_id, place.fence)),
                ],
                [
                    *(job_id, place.fence, old.encode(), new.encode(), gateway),
                    *(self.settings.out_ttl_ms, self.settings.job_keep_ms),
                ],
            )
            match answer[0]:
                case b"attached":
                    fence = Fence(answer[2].decode())
                    policy: Policy = "keep" if answer[5] == b"keep" else "cancel"
                    return Attached(job_id, answer[1].decode(), fence, int(answer[3]), int(answer[4]), policy)
                case b"plain" | b"ended" | b"unknown":
                    return await self.job(job_id) or Unknown(job_id)
        return Unknown(job_id)

    async def job(self, job_id: JobId) -> JobRecord | None:
        """The job as it stands, or None."""
        values = await self._call("job", [self.keys.job(job_id)], RECORD_FIELDS)
        if not values:
            return None
        *texts, text_len = values
        return _to_record(job_id, dict(zip(RECORD_FIELDS, (text or b"" for text in texts), strict=True)), int(text_len))

    async def text(self, job_id: JobId, fence: Fence, start: int = 0, end: int | None = None) -> bytes:
        """Stored answer bytes start..end (exclusive); shorter or empty if not there."""
        if end is not None and end <= start:
            return b""
        last = -1 if end is None else end - 1
        found: bytes = await self.link.send("GETRANGE", self.keys.text(job_id, fence), start, last)
        return found

    async def tokens(self, job_id: JobId, fence: Fence) -> tuple[int, ...]:
        """Stored token ids of the attempt; empty once the job has ended."""
        return unpack_tokens(await self.link.send("GET", self.keys.tokens(job_id, fence)) or b"")

    async def logprobs(self, job_id: JobId, fence: Fence, start: int = 0) -> bytes:
        """Stored records (bus.codec.logprobs) of the attempt from byte `start` on; empty if not there."""
        found: bytes = await self.link.send("GETRANGE", self.keys.logprobs(job_id, fence), start, -1)
        return found

    async def logprobs_len(self, job_id: JobId, fence: Fence) -> int:
        return int(await self.link.send("STRLEN", self.keys.logprobs(job_id, fence)))

    async def keep_logprobs(self, job_id: JobId, fence: Fence, raw: bytes, deadline_ms: int) -> None:
        """Before a job is driven again under `fence`, a key that nobody else writes: the records of its shown text, for
        as long as that. deadline_ms: by the server's clock."""
        until = deadline_ms + self.settings.job_keep_ms
        await self.link.send("SET", self.keys.logprobs(job_id, fence), raw, "PXAT", until)

    async def payload(self, job_id: JobId) -> bytes | None:
        """msgpack of the ChatJob (bus.jobs.decode_job); None once the job has ended or is gone."""
        inline = await self.link.send("HGET", self.keys.job(job_id), "payload")
        found: bytes | None = inline or await self.link.send("GET", self.keys.payload(job_id))
        return found

    async def _cancel(self, job_id: JobId, by: str, only_gateway: str, *, lapsed: bool) -> CancelResult:
        answer = await self._change("cancel", job_id, [by, only_gateway, "1" if lapsed else ""])
        match answer[0]:
            case b"cancelling":
                return Cancelling(job_id)
            case b"ended":
                return Ended(job_id, answer[1].decode(), earlier=len(answer) > 2)
            case b"gateway":
                return WrongGateway(job_id, answer[1].decode())
            case b"not" | b"kept":
                return NotYours(job_id, answer[0].decode())
            case _:
                return NotYours(job_id, "unknown")


def _to_record(job_id: JobId, values: Mapping[str, bytes], text_len: int) -> JobRecord:
    def text(name: str) -> str:
        return values[name].decode("utf-8", "replace")

    def number(name: str) -> int:
        return int(values[name] or 0)

    spec = parse_spec(text("spec"))
    where, name, *rest = text("place").split(" ")
    reason, prompt_tokens, new_tokens, ended, last_node = (text("result") or " 0 0 0 ").split(" ")
    return JobRecord(
        job_id=job_id,
        state=text("state"),  # type: ignore[arg-type]  # written by our scripts only
        fence=Fence(text("fence")),
        route=parse_route(text("route")),
        model=spec.model,
        queue=name if where == "queue" else "",
        stream=spec.stream,
        policy=spec.policy,
        created_ms=spec.created_ms,
        deadline_ms=spec.deadline_ms,
        started_ms=number("started"),
        ended_ms=int(ended),
        seed=spec.seed,
        node=name if where == "node" else last_node,
        owner=rest[0] if where == "node" else "",
        cancel=text("cancel"),
        crashes=number("crashes"),
        node_errors=number("node_errors"),
        relay_losses=number("relay_losses"),
        avoid=tuple(text("avoid").split()),
        alone=values["alone"] == b"1",
        text_len=text_len,
        reason=reason,
        prompt_tokens=int(prompt_tokens),
        new_tokens=int(new_tokens),
        error_code=text("error_code"),
        error_message=text("error_message"),
        score=values["score"],
        logprobs=spec.logprobs,
    )
