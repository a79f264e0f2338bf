"""What a request adds to a token's logit or takes from it, before anything else: vLLM's order and formulas.

    logit_bias           added
    repetition_penalty   of a token in prompt or answer: a logit above 0 is divided by it, one below multiplied
    frequency_penalty    subtracted once for each time that the token stands in the answer so far
    presence_penalty     subtracted once if it does

What comes out is finite wherever the model's own logit is: no request can make a sound model look broken.

The answer so far is all of it, whoever computed it: a resumed sequence goes on with the same values.
"""

import dataclasses
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from gpu_worker.torch_engine.sequence import SamplingChoice
from gpu_worker.torch_engine.token_history import Floats, Ints, TokenHistory
from gpu_worker.torch_engine.transfer import send

LOGIT_MAX = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class Adjustments:
    """For n of a step's rows. Places are (row among these n, token), as two index tensors."""

    rows: Tensor  # (n,) in the step's rows
    bias_at: tuple[Tensor, Tensor]
    bias: Tensor
    answer_at: tuple[Tensor, Tensor]  # tokens of the answers so far, drafts included
    answer_counts: Tensor  # float32, how often each; what stands twice in `answer_at` is added up
    prompt_at: tuple[Tensor, Tensor]  # only of rows with a repetition penalty
    repetition: Tensor  # (n, 1) float32, like the next two
    frequency: Tensor
    presence: Tensor


def plan_adjustments(
    wanted: Sequence[tuple[int, SamplingChoice, TokenHistory | None, tuple[int, ...]]], device: torch.device
) -> Adjustments | None:
    """wanted: (row, choice, history, drafts behind it) of each row. None: nobody asks for any."""
    asked = [
        (row, choice, history, drafts if choice.penalised else ())
        for row, choice, history, drafts in wanted
        if choice.adjusted and history is not None
    ]
    if not asked:
        return None
    choices, histories = [choice for _, choice, _, _ in asked], [history for _, _, history, _ in asked]
    guessed = [numpy.array(drafts, dtype=numpy.int64) for _, _, _, drafts in asked]
    answers = [numpy.concatenate(pair) for pair in zip((one.tokens for one in histories), guessed, strict=True)]
    counts = [part for one, more in zip(histories, guessed, strict=True) for part in (one.counts, _ones(more))]
    return Adjustments(
        rows=send(torch.tensor([row for row, _, _, _ in asked]), device),
        bias_at=_places([one.bias_tokens for one in histories], device),
        bias=send(torch.from_numpy(numpy.concatenate([one.bias for one in histories])), device),
        answer_at=_places(answers, device),
        answer_counts=send(torch.from_numpy(numpy.concatenate(counts)), device),
        prompt_at=_places([one.prompt for one in histories], device),
        repetition=_column([choice.repetition_penalty for choice in choices], device),
        frequency=_column([choice.frequency_penalty for choice in choices], device),
        presence=_column([choice.presence_penalty for choice in choices], device),
    )


def adjust(logits: Tensor, adjustments: Adjustments, late_tokens: Tensor | None) -> Tensor:
    """New logits of `adjustments.rows`, (n, V). late_tokens: (rows,) the last token of each answer where it is not
    among those planned, else -1."""
    changed = logits[adjustments.rows]
    changed.index_put_(adjustments.bias_at, adjustments.bias, accumulate=True)
    counts = torch.zeros_like(changed)
    counts.index_put_(adjustments.answer_at, adjustments.answer_counts, accumulate=True)
    if late_tokens is not None:
        late = late_tokens[adjustments.rows, None]
        counts.scatter_add_(1, late.clamp(min=0), (late >= 0).to(counts.dtype))
    seen = counts > 0
    present = seen.to(counts.dtype)
    seen.index_put_(adjustments.prompt_at, torch.ones((), dtype=torch.bool, device=logits.device))
    weakened = torch.where(changed > 0, changed / adjustments.repetition, changed * adjustments.repetition)
    changed = torch.where(seen, weakened, changed)
    changed = changed - adjustments.frequency * counts - adjustments.presence * present
    return changed.clamp_(-LOGIT_MAX, LOGIT_MAX)


def _places(tokens: Sequence[Ints], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies: what is on its way to the device stays as it is while the histories grow."""
    rows = numpy.repeat(numpy.arange(len(tokens)), [len(ones) for ones in tokens])
    return send(torch.from_numpy(rows), device), send(torch.from_numpy(numpy.concatenate(tokens)), device)


def _ones(tokens: Ints) -> Floats:
    return numpy.ones(len(tokens), dtype=numpy.float32)


def _column(values: list[float], device: torch.device) -> Tensor:
    return send(torch.tensor(values, dtype=torch.float32)[:, None], device)
