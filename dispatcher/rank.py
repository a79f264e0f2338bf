"""Which node gets a job: the one with the shortest expected wait over tokens, not requests.

    wait_ms    = promised prompt tokens / prefill rate + promised new tokens / decode rate     (ahead of the job)
    prefill_ms = the job's own prompt / prefill rate
    penalty_ms = FAILURE_COST_MS x p / (1 - p)       p: the node's failure EWMA, so p/(1-p) failures are expected
    outgrow_ms = context / prefill rate, if a larger one of the candidates is expected to compute all of it again
    cost_ms    = wait_ms + prefill_ms + penalty_ms + outgrow_ms                                 (least first)

Pure: the view of the nodes, the time and the random source are arguments. Whether a chosen node still has room is
checked by the `assign` script; a stale view costs a retry, never an over-reservation.
"""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from bus.codec.wire import QueuedJob
from bus.ids import NodeId
from bus.jobs import is_able

FAILURE_COST_MS = 2_000.0  # what one failure costs a job: the first back-off (1 s) and about as long to notice it
FAILURE_MAX = 0.95  # an EWMA of 1 would be an infinite penalty; such a node is the breaker's business
TIE_FACTOR, TIE_MS = 1.02, 1.0  # costs this close are equal: rates are measured, and herds follow false precision
Draw = Callable[[], float]  # uniform in [0, 1): `random.Random(seed).random`
MISFIT_MS = 1e9  # of a prompt that seems too long: only where no larger node has room, since estimates may be wrong
ALIKE = (
    0.75  # contexts from this part of the largest on count as it: what memory is left on equal machines differs a bit
)
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
    context: int = 0  # tokens of one sequence, prompt and answer; 0 = it does not say
    holds: float = 0.0  # the same, infinite if it does not say; this and the next three are derived, and kept for speed
    prompt_ms: float = 0.0  # per prompt token
    new_ms: float = 0.0  # per new token
    base_ms: float = 0.0  # the part of the cost that is the same for every job

    def __post_init__(self) -> None:
        self.holds = self.context or math.inf
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
    outgrow_ms: float = 0.0


def backlog_ms(node: Node) -> float:
    """How long the tokens already promised keep the node busy."""
    return node.promised_prompt * node.prompt_ms + node.promised_new * node.new_ms


def penalty_ms(node: Node) -> float:
    failure = min(max(node.failure, 0.0), FAILURE_MAX)
    return FAILURE_COST_MS * failure / (1.0 - failure)


class Needed(NamedTuple):
    """Contexts that are large enough for a job."""

    prompt: float  # and the first token of the answer
    whole: float  # prompt and answer


def needed(job: QueuedJob, largest: float) -> Needed:
    """Where no node holds that many tokens, the largest are large enough: nothing is gained elsewhere."""
    prompt, whole = job.est_prompt + 1, job.est_prompt + job.est_new
    most = largest * ALIKE
    return Needed(prompt if prompt <= largest else most, whole if whole <= largest else most)


def outgrow_ms(node: Node, enough: Needed) -> float:
    """What it costs that the node's context seems too small for the job, which would go on elsewhere."""
    if node.holds < enough.prompt:
        return MISFIT_MS
    return node.holds * node.prompt_ms if node.holds < enough.whole else 0.0


def score(node: Node, job: QueuedJob, candidates: int = 0, outgrow: float = 0.0) -> Score:
    wait, penalty, prefill = backlog_ms(node), penalty_ms(node), job.est_prompt * node.prompt_ms
    return Score(
        node.node,
        round(wait + prefill + penalty + outgrow, 1),
        round(wait, 1),
        round(prefill, 1),
        round(penalty, 1),
        node.running,
        candidates,
        round(outgrow, 1),
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


def not_refused(nodes: Iterable[Node], job: QueuedJob) -> list[Node]:
    return [node for node in nodes if node.node not in job.refused]


def not_avoided(nodes: Iterable[Node], avoided: Collection[NodeId]) -> list[Node]:
    """Nodes that failed a job are passed over only while another live node of the model has not failed it."""
    every = list(nodes)
    fresh = [node for node in every if node.node not in avoided] if avoided else every
    return fresh or every


def larger(nodes: Iterable[Node], job: QueuedJob) -> list[Node]:
    """Nodes that may hold what has outgrown a context. An answer that has begun stays with those that say theirs."""
    outgrown = job.outgrown or 0
    return [node for node in nodes if node.context > outgrown or not (node.context or job.begun)]


def same_digest(job: QueuedJob, nodes: list[Node]) -> list[Node]:
    """Of the nodes with room those that can go on from the job's token ids; all when there is none, or no progress."""
    return ([node for node in nodes if node.resume == job.resume] or nodes) if job.resume else nodes


def rank(job: QueuedJob, nodes: Iterable[Node], now_ms: int, draw: Draw, at_most: int = 3) -> list[Score]:
    """The best `at_most` nodes for the job, best first, with the terms of their scores; empty if it has to wait.

    Nodes within a hair of the best take random turns, so that dispatchers with the same view do not herd.
    """
    if job.refused:
        nodes = not_refused(nodes, job)
    if job.outgrown is not None:
        nodes = larger(nodes, job)
    allowed = not_avoided(able(nodes, job.needs) if job.needs else nodes, job.avoid)
    if job.alone:
        return _rank_lone(job, allowed, now_ms)
    nodes = same_digest(job, [node for node in allowed if is_open(node, now_ms)])
    return rank_open(job, nodes, draw, at_most) if job.outgrown is None else _rank_outgrown(job, nodes, at_most)


def rank_open(
    job: QueuedJob, nodes: Sequence[Node], draw: Draw, at_most: int = 3, others: Callable[[], list[Node]] | None = None
) -> list[Score]:
    """`rank` over nodes that are known to be open and right for the job.

    others: more of these nodes, looked at only if one that would be chosen seems too small for the job.
    """
    costs = [node.base_ms + job.est_prompt * node.prompt_ms for node in nodes]
    best = cheapest(nodes, costs, draw, at_most)
    tokens = job.est_prompt + job.est_new
    if all(node.holds >= tokens for node in best):
        return [score(node, job, len(nodes)) for node in best]
    if others:
        nodes = [*nodes, *others()]
    contexts = [node.holds for node in nodes]
    enough = needed(job, max(contexts))
    if others or min(contexts) < max(enough):
        costs = [node.base_ms + job.est_prompt * node.prompt_ms + outgrow_ms(node, enough) for node in nodes]
        best = cheapest(nodes, costs, draw, at_most)
    return [score(node, job, len(nodes), outgrow_ms(node, enough)) for node in best]


def cheapest(nodes: Sequence[Node], costs: Sequence[float], draw: Draw, at_most: int) -> list[Node]:
    if len(nodes) <= 1:
        return list(nodes)
    bound = min(costs) * TIE_FACTOR + TIE_MS
    best = [node for node, cost in zip(nodes, costs, strict=True) if cost <= bound]
    if len(best) > 1:
        first = int(draw() * len(best))  # a rotation: evenly drawn, cheaper than a shuffle
        best = [*best[first:], *best[:first]][:at_most]
    if len(best) < min(at_most, len(nodes)):
        rest = heapq.nsmallest(at_most, zip(costs, range(len(nodes)), strict=True))
        best += [nodes[at] for cost, at in rest if cost > bound][: at_most - len(best)]
    return best


def _rank_outgrown(job: QueuedJob, nodes: Sequence[Node], at_most: int) -> list[Score]:
    """The largest context first, so that a job does not climb from one to the next; those that do not say come last."""
    best = sorted(nodes, key=lambda node: (-node.context, node.base_ms))[:at_most]
    return [score(node, job, len(nodes)) for node in best]


def _rank_lone(job: QueuedJob, nodes: Sequence[Node], now_ms: int) -> list[Score]:
    """Every node that could run the job by itself: the one kept for it, then empty ones, then the soonest empty.

    `assign` takes the first that is empty, or else marks one and keeps others off it until it is.
    """
    free = [node for node in nodes if node.alone in ("", job.job_id) and (not node.broken or may_probe(node, now_ms))]
    free.sort(key=lambda node: (node.alone != job.job_id, node.running > 0, node.base_ms))
    return [score(node, job, len(free)) for node in free]


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
