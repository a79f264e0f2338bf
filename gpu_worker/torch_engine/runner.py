"""From a plan to drawn tokens: all tensors of a step, none of its decisions.

`launch` puts a step on its way, `read` waits for what it drew. Where the device works asynchronously a further step may
be launched before the last one was read: the input of its late rows is then what the step in flight draws, taken on
the device.
"""

import dataclasses
import math

import torch
from torch import Tensor

from gpu_worker.torch_engine.batch import Batch, build_batch
from gpu_worker.torch_engine.model import Model
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.sampler import (
    Sampled,
    SampledToken,
    SampleRow,
    SamplerPlan,
    Scores,
    plan_rows,
    sample_rows,
    to_host,
)
from gpu_worker.torch_engine.transfer import Arrival, send


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step on its way."""

    batch: Batch
    sampler: SamplerPlan
    tokens: Tensor  # (sampled rows,) on the device: what a step launched before this one is read continues with
    arrival: Arrival  # of (pieces,) bool, whether the last hidden row of each is finite, and of what was sampled


@dataclasses.dataclass(frozen=True)
class Result:
    """What one piece of work gave."""

    work: Work
    drawn: tuple[SampledToken, ...]  # one a sampled row
    finite: bool  # whether all its numbers are: a last row sees all before it

    @property
    def tokens(self) -> tuple[int | None, ...]:
        """None: the logits were not finite."""
        return tuple(one.token for one in self.drawn)


class Runner:
    """Runs steps one after the other on one device. depth: steps that may be in flight while the next is launched."""

    def __init__(self, model: Model, *, device: torch.device, depth: int = 0) -> None:
        assert depth in (0, 1), "a late row's token comes from the step before"
        self.model = model
        self.depth = depth
        self._device = device

    @torch.inference_mode()
    def launch(self, plan: Plan, before: Flight | None) -> Flight:
        """before: the step in flight, launched last and not yet read. Nothing here waits for the device."""
        batch = build_batch(plan, block_tokens=self.model.block_tokens)
        sampled_rows = send(batch.sample_rows, self._device)
        late_tokens = None
        rows, sources = late_rows(batch.work, before.batch.work if before else ())
        if before and rows:
            at = send(torch.tensor(rows), self._device)
            known = before.tokens[send(torch.tensor(sources), self._device)]
            tokens = send(batch.tokens, self._device)
            late_tokens = torch.full_like(tokens, -1).index_copy_(0, at, known)[sampled_rows]
            # -1 is a row that was not finite: whatever is computed for its sequence now is dropped when it is read
            batch = dataclasses.replace(batch, tokens=tokens.index_copy(0, at, known.clamp(min=0)))
        hidden = self.model.forward(batch)
        finite = hidden[send(batch.last_rows, self._device)].abs().amax(-1) < math.inf  # of what is no number, neither
        sampler = plan_rows(_rows_to_sample(batch), self._device)
        sampled = self._draw(hidden[sampled_rows], sampler, late_tokens)
        scores = sampled.scores
        scored = (scores.logprobs, scores.top_tokens, scores.top_logprobs) if scores else ()
        return Flight(batch, sampler, sampled.tokens, Arrival([finite, sampled.tokens, *scored]))

    def read(self, flight: Flight) -> list[Result]:
        """Waits for the step. Results in the order of its rows."""
        finite_pieces, tokens, *scores = flight.arrival.wait()
        drawn = to_host(Sampled(tokens, Scores(*scores) if scores else None), flight.sampler)
        results, at = [], 0
        for work, finite in zip(flight.batch.work, finite_pieces.tolist(), strict=True):
            own = tuple(drawn[at : at + work.sampled])
            results.append(Result(work, own, finite and all(one.token is not None for one in own)))
            at += work.sampled
        return results

    def clear(self, blocks: list[int]) -> None:
        """Set keys and values back to zero, behind all that is launched."""
        self.model.clear(blocks)

    def _draw(self, hidden: Tensor, sampler: SamplerPlan, late_tokens: Tensor | None) -> Sampled:
        if not hidden.shape[0]:
            return Sampled(torch.zeros(0, dtype=torch.int64, device=self._device), None)
        return sample_rows(self.model.logits(hidden), sampler, late_tokens)


def late_rows(work: tuple[Work, ...], before: tuple[Work, ...]) -> tuple[list[int], list[int]]:
    """Rows whose token is not known yet, and of each the place of its token among those that the step before draws."""
    places, drawn = {}, 0
    for one in before:
        drawn += one.sampled
        places[id(one.sequence)] = drawn - 1
    rows, sources, row = [], [], 0
    for one in work:
        if one.late:
            rows.append(row)
            sources.append(places[id(one.sequence)])
        row += one.count
    return rows, sources


def _rows_to_sample(batch: Batch) -> list[SampleRow]:
    """The tokens before a draw are those of the sequence now, and the drafts before it."""
    rows = []
    for work in batch.work:
        sequence = work.sequence
        history = sequence.history() if work.sampled else None
        for n in range(work.sampled):
            rows.append(SampleRow(sequence.sampling, work.position + n, history, work.drafts[:n]))
    return rows
