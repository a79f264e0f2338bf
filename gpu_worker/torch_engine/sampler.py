"""Logits to tokens, for all rows of a step at once, each with its own parameters.

A row's token depends on its logits, its parameters, its tokens so far, its seed and its position; never on the rows
beside it. Three parts, so that a step on a GPU waits for nothing:

    plan_rows   host     what the rows ask for, as small tensors
    sample_rows device   logits to tokens and log probabilities; on a GPU without a synchronisation
    to_host     host     waits for the device

    raw logits --> logit_bias, penalties --> greedy, or: temperature, min_p, top_k, top_p, draw --> token
        '--> log_softmax of those who ask --> log probability of the token, and of the likeliest

Log probabilities are of the raw logits, before anything that a request changes about them: OpenAI documents no other,
and vLLM's default (`logprobs_mode=raw_logprobs`) is this.
"""

import dataclasses
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from bus.jobs import LOGPROBS_MAX
from gpu_worker.torch_engine.draws import uniform
from gpu_worker.torch_engine.filters import Filters, pick
from gpu_worker.torch_engine.logprob_trail import TokenScores
from gpu_worker.torch_engine.penalties import LOGIT_MAX, Adjustments, adjust, plan_adjustments
from gpu_worker.torch_engine.sequence import SamplingChoice
from gpu_worker.torch_engine.token_history import TokenHistory
from gpu_worker.torch_engine.transfer import send

CANDIDATES = 256  # most draws end among the likeliest few; a row that needs more is sorted whole, ten times the work
GREEDY_BELOW = 1e-5  # a temperature so small is greedy, and would overflow


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """A row of logits and what it needs to become a token."""

    choice: SamplingChoice
    position: int  # answer tokens before the one to draw
    history: TokenHistory | None = None  # of its sequence; only if its logits are adjusted
    drafts: tuple[int, ...] = ()  # tokens before it that the history does not hold


@dataclasses.dataclass(frozen=True)
class Draws:
    """The rows of a step that are not greedy."""

    rows: Tensor  # (d,)
    temperature: Tensor  # (d, 1)
    filters: Filters


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
    """The rows of a step, as tensors on the device. What no row asks for is None."""

    adjustments: Adjustments | None
    drawn: Draws | None
    scored: Tensor | None  # (s,) rows whose log probabilities are asked for
    scored_rows: tuple[int, ...]  # the same, on the host
    tops: tuple[int, ...]  # of each of these: how many likeliest tokens


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log probabilities of s rows, float32: of the token, and of the LOGPROBS_MAX likeliest tokens in falling order."""

    logprobs: Tensor  # (s, 1)
    top_tokens: Tensor  # (s, LOGPROBS_MAX) int64
    top_logprobs: Tensor


@dataclasses.dataclass(frozen=True)
class Sampled:
    tokens: Tensor  # (rows,) int64; -1: the row's logits are not finite
    scores: Scores | None


@dataclasses.dataclass(frozen=True)
class SampledToken:
    token: int | None  # None: the row's logits are not finite
    scores: TokenScores | None = None


def plan_rows(rows: Sequence[SampleRow], device: torch.device) -> SamplerPlan:
    drawn = [n for n, row in enumerate(rows) if row.choice.temperature >= GREEDY_BELOW]
    scored = tuple(n for n, row in enumerate(rows) if row.choice.logprobs is not None)
    return SamplerPlan(
        adjustments=plan_adjustments([(n, r.choice, r.history, r.drafts) for n, r in enumerate(rows)], device),
        drawn=_plan_draws(drawn, [rows[n] for n in drawn], device) if drawn else None,
        scored=send(torch.tensor(scored), device) if scored else None,
        scored_rows=scored,
        tops=tuple(rows[n].choice.logprobs or 0 for n in scored),
    )


def sample_rows(logits: Tensor, plan: SamplerPlan, late_tokens: Tensor | None = None) -> Sampled:
    """logits: (rows, V) float32. late_tokens: (rows,) int64 on the device, for a row whose last token the host did not
    know when it planned; -1 for all others."""
    raw = logits
    tokens = _likeliest(raw)
    best = raw.gather(1, tokens[:, None])[:, 0]  # of the raw ones: only what the model itself made counts as not finite
    if plan.adjustments is not None:
        changed = adjust(logits, plan.adjustments, late_tokens)
        tokens[plan.adjustments.rows] = _likeliest(changed)
        logits = logits.index_copy(0, plan.adjustments.rows, changed)
    if plan.drawn is not None:
        tokens[plan.drawn.rows] = _draw(logits[plan.drawn.rows], plan.drawn)
    tokens = torch.where(torch.isfinite(best), tokens, -1)
    return Sampled(tokens, None if plan.scored is None else _score(raw[plan.scored], tokens[plan.scored]))


def _likeliest(logits: Tensor) -> Tensor:
    """(rows, V) -> (rows,) int64: the first of the largest, or of what is no number."""
    if logits.is_cuda:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # torch takes ten times as long


def to_host(sampled: Sampled, plan: SamplerPlan) -> list[SampledToken]:
    tokens = [token if token >= 0 else None for token in sampled.tokens.tolist()]
    if sampled.scores is None:
        return [SampledToken(token) for token in tokens]
    found: dict[int, TokenScores] = {}
    chosen, ids, values = (
        part.tolist() for part in (sampled.scores.logprobs, sampled.scores.top_tokens, sampled.scores.top_logprobs)
    )
    for at, (row, top) in enumerate(zip(plan.scored_rows, plan.tops, strict=True)):
        found[row] = TokenScores(chosen[at][0], tuple(zip(ids[at][:top], values[at][:top], strict=True)))
    return [SampledToken(token, found.get(row) if token is not None else None) for row, token in enumerate(tokens)]


def sample(logits: Tensor, choices: Sequence[SamplingChoice], positions: Sequence[int]) -> list[int | None]:
    """All three parts, for rows that no penalty counts tokens of."""
    plan = plan_rows([SampleRow(*one) for one in zip(choices, positions, strict=True)], logits.device)
    return [one.token for one in to_host(sample_rows(logits, plan), plan)]


def _plan_draws(drawn: list[int], rows: list[SampleRow], device: torch.device) -> Draws:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return send(torch.tensor(values, dtype=dtype)[:, None], device)

    return Draws(
        rows=send(torch.tensor(drawn), device),
        temperature=column([row.choice.temperature for row in rows], torch.float32),
        filters=Filters(
            top_k=column([row.choice.top_k for row in rows], torch.int64),
            top_p=column([row.choice.top_p for row in rows], torch.float64),
            min_p=column([row.choice.min_p for row in rows], torch.float64),
            draws=column([uniform(row.choice.seed, row.position) for row in rows], torch.float64),
        ),
    )


def _draw(logits: Tensor, draws: Draws) -> Tensor:
    """One token a row. `log_softmax` adds up each row by itself, in the same order always."""
    # The clamp changes only what the temperature took out of float32: two infinities would become NaN.
    logprobs = torch.log_softmax((logits / draws.temperature).clamp_(-LOGIT_MAX, LOGIT_MAX), -1)
    if logits.is_cuda:  # looking whether the likeliest suffice would be a synchronisation
        values, order = logprobs.sort(dim=-1, descending=True, stable=True)
        return order.gather(1, pick(values.double().exp(), draws.filters, complete=True)[:, None]).squeeze(1)
    values, order = logprobs.topk(min(CANDIDATES, logprobs.shape[1]), -1)
    places = pick(values.double().exp(), draws.filters, complete=order.shape[1] == logprobs.shape[1])
    tokens = order.gather(1, places.clamp(min=0)[:, None]).squeeze(1)
    for row in (places < 0).nonzero().flatten().tolist():
        tokens[row] = _draw_from_all(logprobs[row], values[row], order[row], draws.filters.of(torch.tensor([row])))
    return tokens


def _draw_from_all(logprobs: Tensor, values: Tensor, candidates: Tensor, filters: Filters) -> Tensor:
    """As above, from the whole vocabulary of one row: behind the candidates come all others, in falling order. They
    make one order with them, also where values are equal."""
    rest = logprobs.scatter(0, candidates, float("-inf"))
    order = torch.from_numpy(numpy.argsort(-rest.numpy())[: len(logprobs) - len(candidates)])  # torch takes 4x as long
    masses = torch.cat([values, rest[order]]).double().exp()
    return torch.cat([candidates, order])[pick(masses[None], filters, complete=True)[0]]


def _score(logits: Tensor, tokens: Tensor) -> Scores:
    """Of rows whose logits are not finite the scores mean nothing; they have no token either. Always the same number
    of likeliest tokens: with another one, equal values may come in another order."""
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(min(LOGPROBS_MAX, logprobs.shape[1]), -1)
    return Scores(logprobs.gather(1, tokens.clamp(min=0)[:, None]), ids, values)
