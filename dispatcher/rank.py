"""Which node gets a job: the one with the shortest expected wait over tokens, not requests.

    wait_ms    = promised prompt tokens / prefill rate + promised new tokens / decode rate     (ahead of the job)
    prefill_ms = the job's own prompt / prefill rate
    penalty_ms = FAILURE_COST_MS x p / (1 - p)       p: the node's failure EWMA, so p/(1-p) failures are expected
    cost_ms    = wait_ms + prefill_ms + penalty_ms                                              (least first)

Pure: the view of the nodes, the time and the random source are arguments. Whether a chosen node still has room is
checked by the `assign` script; a stale view costs a retry, never an over-reservation.
"""

import random
from collections.abc import Collection, Iterable, Sequence

import msgspec

from bus.ids import JobId, ModelName, NodeId

FAILURE_COST_MS = 2_000.0  # what one failure costs a job: the first back-off (1 s) and about as long to notice it
FAILURE_MAX = 0.95  # an EWMA of 1 would be an infinite penalty; such a node is the breaker's business
TIE_FACTOR, TIE_MS = 1.02, 1.0  # costs this close are equal: rates are measured, and herds follow false precision
RATE_MIN = 0.1  # tokens/s; a node that has measured nothing yet


class Node(msgspec.Struct):
    """One node that is alive, as the last look showed it; `running` and the promised tokens grow with a pass's picks."""

    node: NodeId
    capacity: int
    running: int = 0
    promised_prompt: int = 0  # tokens of the reservations on it that may still have to be prefilled
    promised_new: int = 0  # tokens of the reservations on it that may still have to be decoded
    prefill_rate: float = 1_000.0  # tokens/s
    decode_rate: float = 20.0  # tokens/s of the whole engine
    failure: float = 0.0  # EWMA of its failures, 0..1; client errors never count
    draining: bool = False
    breaker_until_ms: int = 0  # left out until then; afterwards one job probes it, until a success resets this to 0
    alone_job: str = ""  # the node is kept empty for this job until alone_until_ms
    alone_until_ms: int = 0


class Waiting(msgspec.Struct, frozen=True):
    """A job at a queue's head, as far as the choice of a node needs it."""

    job: JobId
    model: ModelName
    est_prompt: int
    est_new: int
    avoided: frozenset[NodeId] = frozenset()
    alone: bool = False  # its second attempt after a crash: only on a node that is empty


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
    prefill_rate, decode_rate = max(node.prefill_rate, RATE_MIN), max(node.decode_rate, RATE_MIN)
    return 1_000.0 * (node.promised_prompt / prefill_rate + node.promised_new / decode_rate)


def penalty_ms(node: Node) -> float:
    failure = min(max(node.failure, 0.0), FAILURE_MAX)
    return FAILURE_COST_MS * failure / (1.0 - failure)


def base_cost_ms(node: Node) -> float:
    """The part of the cost that is the same for every job."""
    return backlog_ms(node) + penalty_ms(node)


def score(node: Node, est_prompt: int, candidates: int = 0) -> Score:
    wait, penalty = backlog_ms(node), penalty_ms(node)
    prefill = 1_000.0 * est_prompt / max(node.prefill_rate, RATE_MIN)
    total = wait + prefill + penalty
    return Score(node.node, round(total, 1), round(wait, 1), round(prefill, 1), round(penalty, 1), node.running, candidates)


def has_room(node: Node) -> bool:
    """A node behind a breaker that has run out takes a single probe."""
    return node.running < (node.capacity if node.breaker_until_ms == 0 else 1)


def is_open(node: Node, now_ms: int) -> bool:
    """Whether the node takes jobs at all: not draining, its breaker not open, and room for one more."""
    return not node.draining and node.breaker_until_ms <= now_ms and has_room(node)


def is_kept_for(node: Node, now_ms: int) -> str:
    """The job for which the node is being emptied, "" if none."""
    return node.alone_job if node.alone_until_ms > now_ms else ""


def not_avoided(nodes: Iterable[Node], avoided: Collection[NodeId]) -> list[Node]:
    """Nodes that failed a job are passed over only while another live node of the model has not failed it."""
    every = list(nodes)
    fresh = [node for node in every if node.node not in avoided] if avoided else every
    return fresh or every


def eligible(job: Waiting, nodes: Iterable[Node], now_ms: int) -> list[Node]:
    """The nodes that may be offered the job now. A job that must run alone is offered one node only."""
    allowed = not_avoided(nodes, job.avoided)
    if job.alone:
        return _for_lone_job(job, allowed, now_ms)
    return [node for node in allowed if is_open(node, now_ms) and is_kept_for(node, now_ms) == ""]


def _for_lone_job(job: Waiting, nodes: Sequence[Node], now_ms: int) -> list[Node]:
    """The node already kept for the job; else an empty one; else the one that is likely to be empty first.

    `assign` places the job if that node is empty, and otherwise (re)writes the mark that keeps others off it.
    """
    usable = [node for node in nodes if not node.draining and node.breaker_until_ms <= now_ms]
    kept = [node for node in usable if is_kept_for(node, now_ms) == job.job]
    if kept:
        return kept[:1]
    free = [node for node in usable if is_kept_for(node, now_ms) == ""]
    return [min(free, key=lambda node: (node.running > 0, base_cost_ms(node)))] if free else []


def rank(job: Waiting, nodes: Iterable[Node], now_ms: int, rng: random.Random, at_most: int = 3) -> list[Score]:
    """The best `at_most` nodes for the job, best first, with the terms of their scores; empty if it has to wait.

    Nodes within a hair of the best are shuffled, so that dispatchers with the same view do not herd.
    """
    choice = eligible(job, nodes, now_ms)
    scores = [score(node, job.est_prompt, len(choice)) for node in choice]
    if len(scores) > 1:
        scores.sort(key=lambda one: one.cost_ms)
        bound = scores[0].cost_ms * TIE_FACTOR + TIE_MS
        tied = sum(1 for one in scores if one.cost_ms <= bound)
        best = scores[:tied]
        rng.shuffle(best)
        scores[:tied] = best
    return scores[:at_most]


def promise(node: Node, job: Waiting) -> None:
    """Count a pick against the node, so that the rest of the batch spreads over the others."""
    node.running += 1
    node.promised_prompt += job.est_prompt
    node.promised_new += job.est_new
