"""Logits to tokens, for all rows of a step at once, each with its own parameters.

A row's token depends on its logits, its parameters, its seed and its position; never on the rows beside it. Filters
work as in Hugging Face's `generate`: temperature, then top_k, then top_p over what top_k left.
"""

import numpy
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gpu_worker.torch_engine.draws import uniform
from gpu_worker.torch_engine.sequence import SamplingChoice

CANDIDATES = 128  # most draws end among the likeliest few; a row that needs more is sorted whole
GREEDY_BELOW = 1e-5  # a temperature so small is greedy, and would overflow


def sample(logits: Tensor, choices: list[SamplingChoice], positions: list[int]) -> list[int | None]:
    """logits: (rows, V) float32. positions: answer tokens before this one. None: the row's logits are not finite."""
    best, greedy = logits.max(-1)
    tokens: list[int | None] = [
        token if finite else None for token, finite in zip(greedy.tolist(), torch.isfinite(best).tolist(), strict=True)
    ]
    drawn = [
        row for row, choice in enumerate(choices) if choice.temperature >= GREEDY_BELOW and tokens[row] is not None
    ]
    if drawn:
        picked = _draw(logits[drawn], [choices[row] for row in drawn], [positions[row] for row in drawn])
        for row, token in zip(drawn, picked, strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, choices: list[SamplingChoice], positions: list[int]) -> list[int]:
    temperature = torch.tensor([choice.temperature for choice in choices], device=logits.device)
    scaled = logits / temperature[:, None]
    whole = torch.logsumexp(scaled, -1)
    likeliest, tokens = scaled.topk(min(CANDIDATES, scaled.shape[1]), -1)
    masses = torch.exp(likeliest - whole[:, None]).double().cpu().numpy()
    complete = tokens.shape[1] == scaled.shape[1]
    picked = []
    for row, (choice, position) in enumerate(zip(choices, positions, strict=True)):
        draw = uniform(choice.seed, position)
        place = pick(masses[row], choice, draw, complete=complete)
        if place is None:
            rest, order = _rest(scaled[row], tokens[row])
            ordered = numpy.concatenate([masses[row], torch.exp(rest - whole[row]).double().cpu().numpy()])
            place = pick(ordered, choice, draw, complete=True)
            assert place is not None
            picked.append(int(torch.cat([tokens[row], order])[place]))
        else:
            picked.append(int(tokens[row, place]))
    return picked


def _rest(scaled: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """All but the candidates, in falling order: behind them they make one order, also where values are equal."""
    values, order = scaled.scatter(0, candidates, float("-inf")).sort(descending=True, stable=True)
    left = len(scaled) - len(candidates)
    return values[:left], order[:left]


def pick(masses: ArrayLike, choice: SamplingChoice, draw: float, *, complete: bool) -> int | None:
    """The place drawn among probabilities in falling order, or None if those given may not suffice.

    masses: of the likeliest tokens; complete: these are the whole vocabulary. draw: uniform in [0, 1).
    """
    cumulative = numpy.cumsum(masses, dtype=numpy.float64)
    if 0 < choice.top_k <= len(cumulative):
        cumulative = cumulative[: choice.top_k]
        total = float(cumulative[-1])
    elif complete:
        total = float(cumulative[-1])
    elif choice.top_k:
        return None  # the sum over what top_k leaves is not known
    else:
        total = 1.0
    whole_known = complete or choice.top_k > 0
    if choice.top_p < 1.0:
        kept = int(numpy.searchsorted(cumulative, choice.top_p * total)) + 1
        if kept > len(cumulative) and not whole_known:
            return None
        cumulative = cumulative[:kept]
        total = float(cumulative[-1])
        whole_known = True
    place = int(numpy.searchsorted(cumulative, draw * total, side="right"))
    if place < len(cumulative):
        return place
    return len(cumulative) - 1 if whole_known else None
