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
from itertools import chain

import torch
from torch import Tensor

from gpu_worker.torch_engine.sequence import SamplingChoice
from gpu_worker.torch_engine.transfer import send

LOGIT_MAX = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class Adjustments:
    """For n of a step's rows. Places are (row among these n, token), as two index tensors."""

    rows: Tensor  # (n,) in the step's rows
    bias_at: tuple[Tensor, Tensor]
    bias: Tensor
    answer_at: tuple[Tensor, Tensor]  # once for each token of the answers so far
    prompt_at: tuple[Tensor, Tensor]  # only of rows with a repetition penalty
    repetition: Tensor  # (n, 1) float32, like the next two
    frequency: Tensor
    presence: Tensor


def plan_adjustments(
    wanted: Sequence[tuple[int, SamplingChoice, Sequence[int], int]], device: torch.device
) -> Adjustments | None:
    """wanted: (row, choice, prompt and answer tokens, length of the prompt) of each row. None: nobody asks for any."""
    asked = [one for one in wanted if one[1].adjusted]
    if not asked:
        return None
    choices = [choice for _, choice, _, _ in asked]
    repeats = [choice.repetition_penalty != 1.0 for choice in choices]
    biases = [choice.logit_bias for choice in choices]
    return Adjustments(
        rows=send(torch.tensor([row for row, _, _, _ in asked]), device),
        bias_at=_places([[token for token, _ in bias] for bias in biases], device),
        bias=send(torch.tensor([value for bias in biases for _, value in bias], dtype=torch.float32), device),
        answer_at=_places([tokens[start:] if choice.penalised else () for _, choice, tokens, start in asked], device),
        prompt_at=_places(
            [tokens[:start] if repeat else () for repeat, (_, _, tokens, start) in zip(repeats, asked, strict=True)],
            device,
        ),
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
    counts.index_put_(adjustments.answer_at, torch.ones((), device=logits.device), accumulate=True)
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


def _places(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([row for row, ones in enumerate(tokens) for _ in ones], dtype=torch.int64)
    return send(rows, device), send(torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64), device)


def _column(values: list[float], device: torch.device) -> Tensor:
    return send(torch.tensor(values, dtype=torch.float32)[:, None], device)
