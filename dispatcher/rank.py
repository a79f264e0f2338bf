"""Which node gets a job: the one with the shortest expected wait over tokens, not requests.

    wait_ms    = promised prompt tokens / prefill rate + promised new tokens / decode rate     (ahead of the job)
    prefill_ms = the job's own prompt / prefill rate
    penalty_ms = FAILURE_COST_MS x p / (1 - p)       p: the node's failure EWMA, so p/(1-p) failures are expected
    cost_ms    = wait_ms + prefill_ms + penalty_ms                                              (least first)

Pure: the view of the nodes, the time and the random source are arguments. Whether a chosen node still has room is
checked by the `assign` script; a stale view costs a retry, never an over-reservation.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from bus.codec.wire import QueuedJob
from bus.ids import NodeId
from bus.jobs import is_able

FAILURE_COST_MS = 2_000.0  # what one failure costs a job: the first back-off (1 s) and about as long to notice it
FAILURE_MAX = 0.95  # an EWMA of 1 would be an infinite penalty; such a node is the breaker's business
TIE_FACTOR, TIE_MS = 1.02, 1.0  # costs this close are equal: rates are measured, and herds follow false precision
Draw = Callable[[], float]  # uniform in [0, 1): `random.Random(seed).random`
PREFILL_RATE, DECODE_RATE = 1_000.0, 20.0  # tokens/s of a node that has measured nothing yet (0): a modest GPU


class Node(msgspec.Struct):
    """A node that may get jobs, as the last look showed it; its load grows with a pass's picks."""

    node: NodeId
    capacity: int
    running: int = 0
    promised_prompt: int = 0  # tokens of the reservations on it that may still have to be prefilled
    promised_new: int = 0  # tokens of the reservations on it that may still have to be decoded
    prefill_rate: float = 0.0  # tokens/s; 0 = not measured
    decode_rate: float = 0.0  # tokens/s of the whole engine; 0 = not measured
    failure: float = 0.0  # EWMA of its failures, 0..1; client errors never count
    broken: bool = False  # its breaker is not closed: nothing before breaker_until_ms, then one probe at a time
    breaker_until_ms: int = 0
    probing: bool = False  # a probe is on its way
    alone: str = ""  # the job that has this node for itself, or for which it runs empty
    resume: str = ""  # digest of tokenizer and weights: goes on from token ids of nodes with the same one
    can: Collection[str] | None = None  # see `bus.jobs.is_able`, like the next
    cannot: Collection[str] = ()
    prompt_ms: float = 0.0  # per prompt token; this and the next two are derived, and kept for speed
    new_ms: float = 0.0  # per new token
    base_ms: float = 0.0  # the part of the cost that is the same for every job

    def __post_init__(self) -> None:
        self.prompt_ms = 1_000.0 / (self.prefill_rate if self.prefill_rate > 0 else PREFILL_RATE)
        self.new_ms = 1_000.0 / (self.decode_rate if self.decode_rate > 0 else DECODE_RATE)
        self.base_ms = backlog_ms(self) + penalty_ms(self)


class Score(msgspec.Struct, frozen=True):
    """Why a node was chosen; kept with the job as JSON. Lower cost is better, times are in ms."""

    node: NodeId
    cost_ms: float
    wait_ms: float
    prefill_ms: float
    penalty_ms: float
    running: int
    candidates: int = 0  # nodes that were compared


def backlog_ms(node: Node) -> float:
    """How long the tokens already promised keep the node busy."""
    return node.promised_prompt * node.prompt_ms + node.promised_new * node.new_ms


def penalty_ms(node: Node) -> float:
    failure = min(max(node.failure, 0.0), FAILURE_MAX)
    return FAILURE_COST_MS * failure / (1.0 - failure)


def score(node: Node, est_prompt: int, candidates: int = 0) -> Score:
    wait, penalty, prefill = backlog_ms(node), penalty_ms(node), est_prompt * node.prompt_ms
    total = wait + prefill + penalty
    return Score(
        node.node, round(total, 1), round(wait, 1), round(prefill, 1), round(penalty, 1), node.running, candidates
    )


def is_open(node: Node, now_ms: int) -> bool:
    """Whether the node may be offered one more ordinary job."""
    if node.running >= node.capacity or node.alone:
        return False
    return not node.broken or may_probe(node, now_ms)


def may_probe(node: Node, now_ms: int) -> bool:
    return node.breaker_until_ms <= now_ms and not node.probing


def able(nodes: Iterable[Node], needs: Collection[str]) -> list[Node]:
    """Nodes that can do what a job asks for."""
    return [node for node in nodes if is_able(node.can, node.cannot, needs)]


def not_avoided(nodes: Iterable[Node], avoided: Collection[NodeId]) -> list[Node]:
    """Nodes that failed a job are passed over only while another live node of the model has not failed it."""
    every = list(nodes)
    fresh = [node for node in every if node.node not in avoided] if avoided else every
    return fresh or every


def same_digest(job: QueuedJob, nodes: list[Node]) -> list[Node]:
    """Of the nodes with room those that can go on from the job's token ids; all when there is none, or no progress."""
    return ([node for node in nodes if node.resume == job.resume] or nodes) if job.resume else nodes


def rank(job: QueuedJob, nodes: Iterable[Node], now_ms: int, draw: Draw, at_most: int = 3) -> list[Score]:
    """The best `at_most` nodes for the job, best first, with the terms of their scores; empty if it has to wait.

    Nodes within a hair of the best take random turns, so that dispatchers with the same view do not herd.
    """
    if job.refused:
        nodes = [node for node in nodes if node.node not in job.refused]
    allowed = not_avoided(able(nodes, job.needs) if job.needs else nodes, job.avoid)
    if job.alone:
        return _rank_lone(job, allowed, now_ms)
    return rank_open(job, same_digest(job, [node for node in allowed if is_open(node, now_ms)]), draw, at_most)


def rank_open(job: QueuedJob, nodes: Sequence[Node], draw: Draw, at_most: int = 3) -> list[Score]:
    """`rank` over nodes that are known to be open and right for the job."""
    if len(nodes) <= 1:
        return [score(node, job.est_prompt, 1) for node in nodes]
    est_prompt = job.est_prompt
    costs = [node.base_ms + est_prompt * node.prompt_ms for node in nodes]
    bound = min(costs) * TIE_FACTOR + TIE_MS
    best = [node for node, cost in zip(nodes, costs, strict=True) if cost <= bound]
    if len(best) > 1:
        first = int(draw() * len(best))  # a rotation: evenly drawn, cheaper than a shuffle
        best = [*best[first:], *best[:first]][:at_most]
    if len(best) < min(at_most, len(nodes)):
        rest = heapq.nsmallest(at_most, zip(costs, range(len(nodes)), strict=True))
        best += [nodes[at] for cost, at in rest if cost > bound][: at_most - len(best)]
    return [score(node, est_prompt, len(nodes)) for node in best]


def _rank_lone(job: QueuedJob, nodes: Sequence[Node], now_ms: int) -> list[Score]:
    """Every node that could run the job by itself: the one kept for it, then empty ones, then the soonest empty.

    `assign` takes the first that is empty, or else marks one and keeps others off it until it is.
    """
    free = [node for node in nodes if node.alone in ("", job.job_id) and (not node.broken or may_probe(node, now_ms))]
    free.sort(key=lambda node: (node.alone != job.job_id, node.running > 0, node.base_ms))
    return [score(node, job.est_prompt, len(free)) for node in free]


def promise(node: Node, job: QueuedJob) -> None:
    """Count a pick against the node, so that the rest of the batch spreads over the others.

    A lone job takes the whole node, also when that must first run empty.
    """
    node.running += 1
    node.probing = node.broken
    if job.alone:
        node.alone = job.job_id
    node.promised_prompt += job.est_prompt
    node.promised_new += job.est_new
    node.base_ms += job.est_prompt * node.prompt_ms + job.est_new * node.new_ms
