"""Logits to tokens, for all rows of a step at once, each with its own parameters.

A row's token depends on its logits, its parameters, its seed and its position; never on the rows beside it. Filters
work as in Hugging Face's `generate`: temperature, then top_k, then top_p over what top_k left.
"""

import torch
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
    masses = torch.exp(likeliest - whole[:, None]).double().cpu()
    tokens = tokens.cpu()
    picked = []
    for row, (choice, position) in enumerate(zip(choices, positions, strict=True)):
        place = pick(masses[row], choice, uniform(choice.seed, position), complete=masses.shape[1] == scaled.shape[1])
        if place is not None:
            picked.append(int(tokens[row, place]))
            continue
        values, order = scaled[row].sort(descending=True, stable=True)
        place = pick(
            torch.exp(values - whole[row]).double().cpu(), choice, uniform(choice.seed, position), complete=True
        )
        assert place is not None
        picked.append(int(order[place]))
    return picked


def pick(masses: Tensor, choice: SamplingChoice, draw: float, *, complete: bool) -> int | None:
    """The place drawn among probabilities in falling order, or None if those given may not suffice.

    masses: (n,) float64 probabilities of the likeliest n tokens; complete: n is the whole vocabulary.
    draw: uniform in [0, 1).
    """
    cumulative = masses.cumsum(0)
    if 0 < choice.top_k <= len(masses):
        cumulative = cumulative[: choice.top_k]
        total = float(cumulative[-1])
    elif choice.top_k and not complete:
        return None  # needs the sum over more candidates than there are here
    else:
        total = float(cumulative[-1]) if complete else 1.0
    if choice.top_p < 1.0:
        kept = int((cumulative < choice.top_p * total).sum()) + 1
        if kept > len(cumulative):
            if not complete:
                return None
            kept = len(cumulative)
        cumulative = cumulative[:kept]
        total = float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, draw * total, right=True))
    if place >= len(cumulative):
        return len(cumulative) - 1 if complete or choice.top_k or choice.top_p < 1.0 else None
    return place
