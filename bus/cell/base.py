"""What all calls of a cell share: its link, its keys, its settings, and how answers of scripts are read."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from bus.codec.wire import Ended, NotYours, Requeued, Route, Superseded, parse_route
from bus.ids import Fence, Holder, JobId, NodeId
from bus.keys import PRIORITY_AGAIN, CellKeys, QueueName, queue_name
from bus.link import Link
from bus.scripts import load_script
from bus.settings import Settings

TEXT_IN_END_MAX = 256 * 1024  # bytes; a longer answer is read from its own key
CHANGE_TRIES_MAX = 8  # each retry means that somebody else changed the job in between

log = logging.getLogger(__name__)


class JobPlace(msgspec.Struct, frozen=True):
    """Where a job stands: what a caller must know to declare the keys of a change."""

    fence: Fence
    route: Route
    text: str  # the field `place`: "queue <name> <entry>" | "queue <name>" | "node <id> <owner> <entry>"
    model: str

    @property
    def node(self) -> str:
        words = self.text.split(" ")
        return words[1] if words[0] == "node" else ""

    @property
    def queue(self) -> QueueName:
        """Where it waits; for one that runs, where it would wait again."""
        words = self.text.split(" ")
        return QueueName(words[1]) if words[0] == "queue" else queue_name(self.model, PRIORITY_AGAIN)


class CellBase:
    def __init__(self, link: Link, cell: int, settings: Settings) -> None:
        self.link = link
        self.cell = cell
        self.keys = CellKeys(cell)
        self.settings = settings

    async def _call(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        return await self.link.script(load_script(name), keys, args)

    async def members(self, key: str, raw: Iterable[bytes], is_ours: Callable[[str], bool], reason: str) -> list[str]:
        """Members of a set or zset as texts. Anybody may add to one: those that are not ours are put away, each as
        one entry in `dead` with the reason."""
        ours = []
        for one in raw:
            word = one.decode("utf-8", "replace")
            if is_ours(word):
                ours.append(word)
                continue
            name = key.removeprefix(self.keys.prefix)
            log.warning("dead letter", extra={"source": name, "member": word[:80], "why": reason})
            await self._call("cast_out", [self.keys.dead, key], [one, reason, self.settings.dead_keep_ms, name])
        return ours

    async def _place(self, job_id: JobId) -> JobPlace | None:
        values = await self.link.send("HMGET", self.keys.job(job_id), "fence", "route", "place", "spec")
        if None in values:
            return None  # no such job, or a foreign hash
        fence, route, place, spec = (value.decode() for value in values)
        return JobPlace(Fence(fence), parse_route(route), place, spec.partition(" ")[0])

    def _route_keys(self, job_id: JobId, route: Route) -> tuple[str, str, str, str]:
        """out, gateway's set, usage, quota; the job's own key stands for one that it has not."""
        keys = self.keys
        own = keys.job(job_id)
        return (
            keys.out(route.out),
            keys.gateway_jobs(route.gateway) if route.gateway else own,
            keys.usage(route.address) if route.address else own,
            keys.quota(route.key_id) if route.key_id else own,
        )

    def _change_keys(self, job_id: JobId, place: JobPlace) -> list[str]:
        """KEYS 1..22 of `_change.lua`."""
        keys = self.keys
        own = keys.job(job_id)
        out, gateway_jobs, usage, quota = self._route_keys(job_id, place.route)
        again = queue_name(place.model, PRIORITY_AGAIN)
        node = NodeId(place.node)
        if place.node:
            of_node = [keys.node(node), keys.node_running(node), keys.node_load(node), keys.node_jobs(node)]
            of_node.append(keys.node_control(node))
        else:
            of_node = [own] * 5
        return [
            *(own, out, gateway_jobs, usage, quota, keys.payload(job_id)),
            *(keys.text(job_id, place.fence), keys.tokens(job_id, place.fence), keys.deadlines, keys.late),
            *(keys.queue(place.queue), keys.queue(again), keys.queues, keys.wake),
            *of_node,
            *(keys.dead, keys.events, keys.logprobs(job_id, place.fence)),
        ]

    async def _change(
        self, script: str, job_id: JobId, args: Sequence[str | bytes | int], fence: Fence | None = None
    ) -> list[Any]:
        """Run one of the scripts on `_change.lua`; reads the place of the job first, and again when it has moved.

        With `fence`, only that attempt is touched: [b"not", state] otherwise. [b"unknown"] if there is no such job.
        """
        settings = self.settings
        for _ in range(CHANGE_TRIES_MAX):
            place = await self._place(job_id)
            if place is None:
                return [b"unknown"]
            if fence is not None and place.fence != fence:
                return [b"not", b"fence"]
            common: list[str | bytes | int] = [
                *(job_id, place.fence, place.route.encode(), place.text, self.keys.prefix),
                *(settings.out_ttl_ms, settings.result_ttl_ms, TEXT_IN_END_MAX),
                *(settings.dead_keep_ms, settings.node_keep_ms),
            ]
            answer: list[Any] = await self._call(script, self._change_keys(job_id, place), [*common, *args])
            if answer[0] != b"moved":
                return answer
        return [b"not", b"moving"]

    async def _requeue(
        self, job_id: JobId, fence: Fence, why: str, detail: str, lacks: str = ""
    ) -> Requeued | Ended | NotYours:
        """`why` may also be expired | down, which the script resolves to crash, unread or relay_lost."""
        return to_requeued(job_id, await self._call_requeue(job_id, fence, why, detail, lacks))

    async def _call_requeue(
        self, job_id: JobId, fence: Fence, why: str, detail: str, lacks: str = "", context: int = 0
    ) -> list[Any]:
        settings = self.settings
        args: list[str | bytes | int] = [
            *(why, detail[:500], settings.backoff_ms, settings.node_errors_max, settings.crashes_max),
            *(settings.breaker_ms, settings.breaker_max_ms, lacks, context, settings.node_ttl_ms),
        ]
        return await self._change("requeue", job_id, args, fence)


def to_requeued(job_id: JobId, answer: list[Any]) -> Requeued | Ended | NotYours:
    match answer[0]:
        case b"requeued":
            return Requeued(job_id, answer[1].decode(), int(answer[2]), alone=answer[3] == b"1")
        case b"ended":
            return Ended(job_id, answer[1].decode(), earlier=len(answer) > 2)
        case b"not":
            return NotYours(job_id, answer[1].decode())
        case _:
            return NotYours(job_id, "unknown")


def attempt_named(member: str) -> tuple[JobId, Fence]:
    """Of a reservation "job/fence"."""
    job_id, _, fence = member.partition("/")
    return JobId(job_id), Fence(fence)


def epoch_of(holder: Holder) -> int:
    """The epoch in "<worker>.<epoch>"; 0 if it names none."""
    tail = holder.rpartition(".")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def raise_if_superseded(node: NodeId, holder: Holder, answer: list[Any]) -> None:
    if answer and answer[0] == b"superseded":
        raise Superseded(node, holder, answer[1].decode())
