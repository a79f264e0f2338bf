"""Requests to the scripts and their answers: what `bus.cell` takes and returns.

All times are milliseconds of the server's clock, all text offsets UTF-8 bytes of the answer, token ids four bytes
each, little endian. A union is matched, never a magic value compared.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import quote, unquote

import msgspec

from bus.ids import Fence, GatewayId, Holder, JobId, NodeId
from bus.jobs import ChatJob
from bus.keys import PRIORITY_NEW, QueueName

JobState = Literal["queued", "running", "done", "failed", "cancelled", "duplicate"]
NodeState = Literal["starting", "up", "draining", "bye"]
NODE_STATES: frozenset[str] = frozenset({"starting", "up", "draining", "bye"})
TERMINAL_STATES: frozenset[str] = frozenset({"done", "failed", "cancelled", "duplicate"})
RequeueWhy = Literal["crash", "node_error", "unable", "drain", "unread", "relay_lost"]
Policy = Literal["cancel", "keep"]  # what becomes of the job when its gateway is gone

NO_FENCE = Fence("0.0")  # of a job that was never assigned


class Route(msgspec.Struct, frozen=True):
    """Whose job it is. One text in the job hash; scripts compare it whole and answer `Moved` when it differs.

    It names every key that ending the job writes besides the job's own, so callers can declare them.
    """

    out: str  # "gateway:<id>" or "reply:<name>": frames, markers and the terminal go there
    gateway: GatewayId | Literal[""] = ""  # its set of jobs; empty for a plain producer
    address: str = ""  # whom usage is accounted to
    key_id: str = ""  # whose quota the job takes a place of

    def encode(self) -> str:
        if not (self.gateway or self.address or self.key_id):
            return self.out
        return f"{self.out} {self.gateway} {quote(self.address, safe='')} {quote(self.key_id, safe='')}"


def parse_route(text: str) -> Route:
    out, *rest = text.split(" ")
    gateway, address, key_id = (*rest, "", "", "")[:3]
    return Route(out=out, gateway=GatewayId(gateway), address=unquote(address), key_id=unquote(key_id))


def new_nonce() -> str:
    return secrets.token_hex(5)


def make_fence(attempt: int, nonce: str) -> Fence:
    return Fence(f"{attempt}.{nonce}")


def attempt_of(fence: Fence) -> int:
    return int(fence.partition(".")[0])


def pack_tokens(tokens: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def unpack_tokens(raw: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw) - len(raw) % 4, 4))


class Superseded(Exception):
    """Another holder owns the node: drop everything and exit; nothing of yours counts any more."""

    def __init__(self, node: NodeId, holder: Holder, owner: str) -> None:
        super().__init__(f"node {node} belongs to {owner or 'nobody'}, not to {holder}")
        self.node, self.holder, self.owner = node, holder, owner


# --- submit ---------------------------------------------------------------------------------------------------------


class Submission(msgspec.Struct, frozen=True):
    """A job on its way in. A re-drive is the same id again, with what its caller has seen (design 3.6)."""

    job_id: JobId
    job: ChatJob
    out: str  # "gateway:<id>" or "reply:<name>"
    gateway: GatewayId | Literal[""] = ""
    policy: Policy = "cancel"
    deadline_in_ms: int = 600_000  # from now, by the server's clock
    est_prompt: int = 1  # tokens, for load and admission only
    est_new: int = 256
    priority: int = PRIORITY_NEW
    seed: int | None = None  # None: the job's own seed, else drawn at submit; all attempts draw alike
    tenant: str = ""  # scope of idem_key
    idem_key: str = ""
    body_digest: str = ""  # another body under the same idem_key is a conflict
    address: str = ""
    key_id: str = ""
    quota_max: int = 0  # jobs in flight for key_id in this cell; 0 = no limit
    redrive: bool = False  # never refused for room, quota or lack of a node: it was admitted once
    attempt_floor: int = 0  # re-drive: the highest attempt its caller has seen
    shown_text: bytes = b""  # re-drive: what was shown of the answer
    deadline_at_ms: int = 0  # re-drive: the original deadline; overrides deadline_in_ms

    @property
    def route(self) -> Route:
        return Route(out=self.out, gateway=self.gateway, address=self.address, key_id=self.key_id)


class Accepted(msgspec.Struct, frozen=True):
    """The job exists. `existing`: it did before this call; then state and fence are its present ones."""

    job_id: JobId
    state: JobState
    existing: bool
    deadline_ms: int
    fence: Fence = NO_FENCE
    gateway: str = ""  # whose stream it is on; an `existing` job may belong to another gateway


class Refused(msgspec.Struct, frozen=True):
    """Nothing was written.

    code: queue_full | quota_full | no_model (nobody ever served it) | no_node (known, but no node is alive) |
    uncovered (only parts of the model are served; the reason names the missing layers) | unsupported (of the nodes that
    serve the model none can do what the job asks for; the reason names it) | idem_conflict (same key,
    another body) | memory_full | bad_reply | full (the front door).
    """

    code: str
    reason: str
    retry_after_ms: int = 0  # 0 = a retry does not help


# --- dispatch -------------------------------------------------------------------------------------------------------


class QueuedJob(msgspec.Struct, frozen=True):
    """One entry of a queue, as `look` found it."""

    entry_id: str
    job_id: JobId
    fence: Fence  # of its last attempt: names where its progress is stored; NO_FENCE for none
    out: str
    est_prompt: int
    est_new: int
    deadline_ms: int
    alone: bool = False  # crashed twice: runs on an empty node only, see `assign`
    avoid: tuple[NodeId, ...] = ()  # passed over only while another live node of the model is not avoided
    resume: str = ""  # digest whose nodes can go on from its token ids; "" = no progress, or text only
    needs: tuple[str, ...] = ()  # what its node must be able to do
    refused: tuple[NodeId, ...] = ()  # of those to avoid: they said that they cannot, and are never asked again
    outgrown: int | None = None  # a context of so many tokens was too small for it; 0: one of a node that does not say
    begun: bool = False  # handed back with text of its answer, which an HTTP node would say again in words of its own

    @property
    def queued_ms(self) -> int:
        """When it entered this queue, by the server's clock."""
        return int(self.entry_id.partition("-")[0])


class QueueView(msgspec.Struct, frozen=True):
    queue: QueueName
    length: int
    heads: tuple[QueuedJob, ...]


class NodeView(msgspec.Struct, frozen=True):
    """One node as the server sees it now."""

    node: NodeId
    state: NodeState
    alive: bool  # has beaten within its TTL
    leased: bool  # its owner's lease holds; only alive and leased nodes get jobs
    owner: str
    kind: str  # torch | echo | http
    models: tuple[str, ...]
    capacity: int
    running: int  # reservations
    promised_prompt: int  # tokens, summed over the reservations
    promised_new: int
    prefill_rate: float
    decode_rate: float
    failure: float  # EWMA of node failures per ended job, 0..1
    breaker_n: int  # failures in a row; 0 = closed
    breaker_until_ms: int  # no jobs before; after it one probe at a time until one succeeds
    alone: str  # job that has, or had, this node for itself or waits for it; `assign` knows whether it still holds
    last_beat_ms: int
    alone_until_ms: int = 0
    epoch: int = 0
    resume: str = ""
    layers: tuple[int, ...] = ()
    layer_count: int = 0
    whole: bool = True
    context_length: int = 0
    ok: int = 0  # jobs it ended well since it is known
    failed: int = 0  # failures that are the node's: errors and crashes
    client_errors: int = 0
    api_url: str = ""
    api: str = ""
    key_id: str = ""
    gpu_memory_gb: float = 0.0
    version: str = ""
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    drafted: int = 0  # tokens guessed by speculation since its worker started, and those of them that were right
    accepted: int = 0
    loop_lag_ms: float = 0.0  # of its worker's event loop, 99th percentile of the last seconds, and the longest
    loop_lag_max_ms: float = 0.0
    breaker_probe: str = ""  # job/fence that tries the node out
    can: tuple[str, ...] | None = None  # what it says that it can do; None: it does not say
    cannot: tuple[str, ...] = ()  # what it has refused to do a moment ago

    def usable(self, now_ms: int) -> bool:
        """Whether `assign` would consider it now, room left aside."""
        breaker_open = self.breaker_n > 0 and now_ms < self.breaker_until_ms
        return self.alive and self.leased and self.state == "up" and not breaker_open


class CellView(msgspec.Struct, frozen=True):
    now_ms: int
    queues: tuple[QueueView, ...]
    nodes: Mapping[NodeId, NodeView]  # every known node of the models of these queues
    due_ms: int = 0  # when the first held-back job or open breaker falls due; 0 = nothing is waiting for time

    def nodes_of(self, model: str) -> list[NodeView]:
        return [view for view in self.nodes.values() if model in view.models]


class Pick(msgspec.Struct, frozen=True):
    """A queued job and where it may go, best node first. Name every live node for a job that is `alone`."""

    entry_id: str
    job_id: JobId
    fence: Fence  # as in QueuedJob
    out: str
    nodes: tuple[NodeId, ...]
    nonce: str  # new_nonce()
    score: bytes = b""  # JSON of the score terms, kept with the job


class Assigned(msgspec.Struct, frozen=True):
    job_id: JobId
    fence: Fence
    node: NodeId


class NotAssigned(msgspec.Struct, frozen=True):
    """why: gone | not_queued (entry deleted in both) | changed (look again) | no_room (no named node can take it now) |
    alone (waits for the node it has marked to run empty) | deadline (the sweep will end it)."""

    job_id: JobId
    why: Literal["gone", "not_queued", "changed", "no_room", "alone", "deadline"]
    needs: tuple[str, ...] = ()  # with no_room: what it asks for; an entry of an older release does not say


# --- worker ---------------------------------------------------------------------------------------------------------


class FlushPiece(msgspec.Struct, frozen=True):
    job_id: JobId
    fence: Fence
    route: Route  # from the assignment, or from the last `Moved`
    text_offset: int
    text: bytes  # whole UTF-8 characters
    token_offset: int
    tokens: bytes  # pack_tokens
    logprobs_offset: int = 0
    logprobs: bytes | None = None  # whole records (bus.codec.logprobs); None: the job does not ask for them


class FinishPiece(msgspec.Struct, frozen=True):
    """The end of an attempt. It may carry the last text, so a short job needs no flush."""

    job_id: JobId
    fence: Fence
    route: Route
    text_offset: int
    text: bytes
    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int = 0
    new_tokens: int = 0
    error_code: str = ""
    error_message: str = ""
    fault: Literal["", "client", "node"] = ""  # client errors never count against the node
    logprobs_offset: int = 0
    logprobs: bytes | None = None


class Stored(msgspec.Struct, frozen=True):
    text_len: int
    token_len: int


class Gap(msgspec.Struct, frozen=True):
    """Nothing was stored: send again from these lengths."""

    text_len: int
    token_len: int
    logprobs_len: int = 0


class Stop(msgspec.Struct, frozen=True):
    """Not your attempt (any more): drop the sequence and say nothing.

    why: unknown | fence | queued | done | failed | cancelled.
    """

    why: str


class Moved(msgspec.Struct, frozen=True):
    """Another gateway took the stream over. Nothing was written: send again with this route."""

    route: Route


FlushReply = Stored | Gap | Stop | Moved


class Finished(msgspec.Struct, frozen=True):
    """The job has its terminal. The state is `cancelled` if a cancel came first, whatever the piece said.

    A repeat of the same finish gets the same answer."""

    state: JobState


FinishReply = Finished | Gap | Stop | Moved


class Renewed(msgspec.Struct, frozen=True):
    expires_ms: int
    stop: Mapping[str, str]  # "job/fence" -> why: drop it, it is not yours any more
    cancel: tuple[str, ...]  # "job/fence": still yours; end it as cancelled
    others: tuple[str, ...]  # "job/fence" reserved for this node that the caller did not list: not read yet, or a
    # finish that a server lost: repeat it if it is among those you kept


# --- everything else about jobs -------------------------------------------------------------------------------------


class Requeued(msgspec.Struct, frozen=True):
    job_id: JobId
    why: str  # as counted: an expired reservation resolves to crash, unread or relay_lost; or outgrown
    due_ms: int  # 0 = at once; else held back until then
    alone: bool = False


class Largest(msgspec.Struct, frozen=True):
    """No other node may hold what outgrew this one. Nothing was changed."""

    job_id: JobId


class Ended(msgspec.Struct, frozen=True):
    """The call ended the job, or found it ended (`earlier`)."""

    job_id: JobId
    state: JobState
    earlier: bool = False


class NotYours(msgspec.Struct, frozen=True):
    """Another attempt, not running, unknown, or the reservation has been renewed meanwhile. Nothing was changed."""

    job_id: JobId
    state: str  # "unknown" if there is no such job


class Cancelling(msgspec.Struct, frozen=True):
    """It runs: the worker was told; the slot is held until its finish."""

    job_id: JobId


class WrongGateway(msgspec.Struct, frozen=True):
    """`only_gateway` was given, but another gateway has the job now. Nothing was changed."""

    job_id: JobId
    gateway: str


CancelResult = Ended | Cancelling | WrongGateway | NotYours


class JobRecord(msgspec.Struct, frozen=True):
    """The job hash. Numbers are 0 and texts empty where not yet set."""

    job_id: JobId
    state: JobState
    fence: Fence
    route: Route
    model: str = ""
    queue: str = ""
    stream: bool = False
    policy: str = ""
    created_ms: int = 0
    deadline_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    seed: int = 0
    node: str = ""
    owner: str = ""
    cancel: str = ""  # by whom
    crashes: int = 0
    node_errors: int = 0
    relay_losses: int = 0
    avoid: tuple[str, ...] = ()
    alone: bool = False
    text_len: int = 0
    reason: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    error_code: str = ""
    error_message: str = ""
    score: bytes = b""  # terms of its last assignment
    logprobs: bool = False  # it asks for log probabilities

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES


class Attached(msgspec.Struct, frozen=True):
    """The stream is the caller's now; text up to text_len is read with `Cell.text(job_id, fence, ...)`, the rest
    comes as frames. A marker with the same figures leads the new out-stream if the job runs."""

    job_id: JobId
    state: Literal["queued", "running"]
    fence: Fence
    text_len: int
    deadline_ms: int
    policy: Policy = "cancel"


class Unknown(msgspec.Struct, frozen=True):
    job_id: JobId


# --- nodes ----------------------------------------------------------------------------------------------------------


class Owned(msgspec.Struct, frozen=True):
    node: NodeId
    epoch: int
    holder: Holder
    left: tuple[str, ...]  # "job/fence" reservations of an earlier owner: its `down` or the sweep requeues them


class HeldBy(msgspec.Struct, frozen=True):
    """The node has a living owner; nothing was changed."""

    node: NodeId
    holder: str
    expires_ms: int


class Applied(msgspec.Struct, frozen=True):
    """What became of a node event, or of a removal. Only `applied` changed anything, and a removal's `departed`.

    superseded: an older epoch or entry. expired: older than its TTL. unknown: an HTTP beat of a node nobody
    registered. not_owner: registered by another key. departed: it left, a tombstone stands. held: removal must wait.
    """

    status: Literal["applied", "superseded", "expired", "unknown", "not_owner", "departed", "held"]


class LockTaken(msgspec.Struct, frozen=True):
    node: NodeId
    epoch: int  # fencing token: the registration's epoch


class LockBusy(msgspec.Struct, frozen=True):
    node: NodeId
    retry_after_ms: int


class SweepReport(msgspec.Struct, frozen=True):
    swept: bool  # False: another holder sweeps now
    grace_until_ms: int = 0  # nothing is reclaimed before
    requeued: tuple[Requeued, ...] = ()
    ended: tuple[Ended, ...] = ()
    released: int = 0  # late jobs that went back to their queue
    removed_nodes: tuple[NodeId, ...] = ()
    departed_nodes: tuple[NodeId, ...] = ()  # of the removed ones those that had said bye
