"""Which of a row's tokens may be drawn, and the one that a random number draws: for all rows at once, without a loop.

Probabilities lie in falling order, so each filter keeps a prefix of them. The order of the filters is vLLM's
(docs, "V1 sampler"): temperature (already in the probabilities), min_p, top_k, top_p over what the others left.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Filters:
    """One entry a row, each (rows, 1)."""

    top_k: Tensor  # int64; 0 = off
    top_p: Tensor  # float64; 1 = off
    min_p: Tensor  # float64; 0 = off
    draws: Tensor  # float64, uniform in [0, 1)

    def of(self, rows: Tensor) -> "Filters":
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.draws[rows])


def pick(masses: Tensor, filters: Filters, *, complete: bool) -> Tensor:
    """The place drawn in each row, (rows,) int64; -1 where the probabilities given may not suffice.

    masses: (rows, n) float64, the n likeliest tokens' probabilities in falling order. complete: these are all tokens.
    """
    width = masses.shape[1]
    cumulative = masses.cumsum(-1)
    # The prefix that min_p and top_k leave. It is whole when it ends within what we have.
    by_top_k = torch.where(filters.top_k > 0, filters.top_k, width + 1)
    likely = (masses >= filters.min_p * masses[:, :1]).sum(-1, keepdim=True)
    by_min_p = torch.where((filters.min_p > 0) & (likely < width), likely, width + 1)
    kept = torch.minimum(by_top_k, by_min_p)
    whole = kept <= width
    if complete:
        whole = torch.ones_like(whole)
    unfiltered = (filters.top_k == 0) & (filters.min_p == 0)
    kept = kept.clamp(1, width)
    total = torch.where(whole, cumulative.gather(1, kept - 1), 1.0)
    unknown = ~(whole | unfiltered)
    # top_p: the fewest tokens whose sum reaches its part of what is left.
    reaching = (cumulative < filters.top_p * total).sum(-1, keepdim=True) + 1
    cuts = filters.top_p < 1
    unknown |= cuts & ~whole & (reaching > kept)
    kept = torch.where(cuts, torch.minimum(kept, reaching), kept)
    whole |= cuts & ~unknown
    total = torch.where(whole, cumulative.gather(1, kept - 1), total)
    place = (cumulative <= filters.draws * total).sum(-1, keepdim=True)
    unknown |= (place >= kept) & ~whole
    return torch.where(unknown, -1, torch.minimum(place, kept - 1)).squeeze(1)
