"""Temperature, top_k, top_p: the right tokens with the right probabilities, row by row."""

import math
from collections import Counter

import pytest
import torch

from gpu_worker.torch_engine.sampler import CANDIDATES, pick, sample
from gpu_worker.torch_engine.sequence import SamplingChoice

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def choice(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> SamplingChoice:
    return SamplingChoice(temperature, top_p, top_k, seed)


def frequencies(one: SamplingChoice, logits: torch.Tensor = LOGITS, draws: int = 2500) -> dict[int, float]:
    rows = logits.expand(draws, -1)
    tokens = sample(rows, [one] * draws, list(range(draws)))
    return {token: count / draws for token, count in sorted(Counter(tokens).items()) if token is not None}


def test_greedy_takes_the_likeliest() -> None:
    assert sample(LOGITS[None], [choice(temperature=0.0)], [0]) == [0]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    found = frequencies(choice())

    for token, expected in enumerate([0.5, 0.25, 0.15, 0.07, 0.03]):
        assert found[token] == pytest.approx(expected, abs=0.03)


def test_a_high_temperature_flattens_and_a_low_one_sharpens() -> None:
    assert frequencies(choice(temperature=2.0))[0] < 0.45
    assert frequencies(choice(temperature=0.3))[0] > 0.85


def test_top_k_leaves_the_k_likeliest_in_proportion() -> None:
    assert frequencies(choice(top_k=2)) == {0: pytest.approx(2 / 3, abs=0.03), 1: pytest.approx(1 / 3, abs=0.03)}


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    """0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15: three are left."""
    assert list(frequencies(choice(top_p=0.8))) == [0, 1, 2]


def test_top_p_works_on_what_top_k_left() -> None:
    """Of the two that top_k leaves the first has two thirds, which reaches 0.6."""
    assert list(frequencies(choice(top_k=2, top_p=0.6))) == [0]


def test_a_tiny_top_p_is_greedy() -> None:
    assert frequencies(choice(top_p=1e-6)) == {0: 1.0}


def test_a_flat_distribution_over_many_tokens_reaches_all_of_them() -> None:
    """More than the candidates that are looked at first."""
    wide = torch.zeros(CANDIDATES * 2)

    found = frequencies(choice(), wide, draws=1200)
    with_top_p = frequencies(choice(top_p=0.9), wide, draws=600)

    assert len(found) > CANDIDATES * 1.9
    assert CANDIDATES * 1.5 < len(with_top_p) <= math.ceil(CANDIDATES * 2 * 0.9)


def test_a_row_draws_the_same_whatever_rows_are_beside_it() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(8, 1000, generator=generator)
    choices = [choice(temperature=0.5 + 0.2 * n, top_p=0.9 if n % 2 else 1.0, top_k=n * 10, seed=n) for n in range(8)]
    together = sample(logits, choices, list(range(8)))

    alone = [sample(logits[n : n + 1], [choices[n]], [n])[0] for n in range(8)]

    assert together == alone


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.stack([LOGITS, LOGITS * float("nan"), LOGITS + float("inf")])

    assert sample(logits, [choice(temperature=0.0)] * 3, [0] * 3) == [0, None, None]


def test_every_draw_has_a_place() -> None:
    """The edges of the unit interval included."""
    masses = [0.7, 0.2, 0.1]

    assert pick(masses, choice(), 0.0, complete=True) == 0
    assert pick(masses, choice(), 1.0 - 2**-53, complete=True) == 2
    assert pick(masses, choice(top_p=0.9), 1.0 - 2**-53, complete=True) == 1
    assert pick([0.35, 0.1, 0.05], choice(), 0.9, complete=False) is None
