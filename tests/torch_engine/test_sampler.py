"""Temperature, min_p, top_k, top_p: the right tokens with the right probabilities, row by row."""

import math
from collections import Counter

import pytest
import torch

from gpu_worker.torch_engine.filters import Filters, pick
from gpu_worker.torch_engine.sampler import CANDIDATES, SampleRow, plan_rows, sample, sample_rows
from gpu_worker.torch_engine.sequence import SamplingChoice

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def choice(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, min_p: float = 0.0
) -> SamplingChoice:
    return SamplingChoice(temperature, top_p, top_k, seed, min_p)


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
    with_top_p = frequencies(choice(top_p=0.9), wide, draws=1200)

    # So many of n equal ones come in 1,200 draws: n (1 - e^(-1200/n)).
    assert len(found) == pytest.approx(len(wide) * (1 - math.exp(-1200 / len(wide))), rel=0.05)
    assert len(with_top_p) == pytest.approx(len(wide) * 0.9 * (1 - math.exp(-1200 / len(wide) / 0.9)), rel=0.05)


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


def places(masses: list[float], draw: float, *, complete: bool, **filters: float) -> int:
    columns = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "draws": draw} | filters
    tensors = {name: torch.tensor([[value]]).double() for name, value in columns.items()}
    tensors["top_k"] = tensors["top_k"].long()
    return int(pick(torch.tensor([masses]).double(), Filters(**tensors), complete=complete))


def test_every_draw_has_a_place() -> None:
    """The edges of the unit interval included."""
    masses, last = [0.7, 0.2, 0.1], 1.0 - 2**-53

    assert places(masses, 0.0, complete=True) == 0
    assert places(masses, last, complete=True) == 2
    assert places(masses, last, complete=True, top_p=0.9) == 1
    assert places(masses, last, complete=True, top_k=9) == 2


def test_what_the_likeliest_cannot_tell_is_not_guessed() -> None:
    """Of 0.5 that are known a draw beyond them, a larger top_k, or a top_p or min_p that reaches further, needs the
    rest; filters that end within what is known do not."""
    known = [0.35, 0.1, 0.05]

    assert places(known, 0.9, complete=False) == -1
    assert places(known, 0.1, complete=False, top_k=4) == -1
    assert places(known, 0.1, complete=False, top_p=0.6) == -1
    assert places(known, 0.1, complete=False, min_p=0.1) == -1
    assert places(known, 0.1, complete=False) == 0
    assert places(known, 0.99, complete=False, top_k=3) == 2
    assert places(known, 0.99, complete=False, top_p=0.4) == 1
    assert places(known, 0.99, complete=False, min_p=0.2) == 1


def test_min_p_leaves_what_is_likely_enough_beside_the_likeliest() -> None:
    """A fifth of 0.5 is 0.1: three tokens reach it."""
    assert list(frequencies(choice(min_p=0.2))) == [0, 1, 2]


def test_the_order_of_the_filters_is_min_p_then_top_k_then_top_p() -> None:
    """min_p leaves 0.5, 0.25, 0.15; of the first two, 2/3 and 1/3, top_p takes as many as reach 0.66: one."""
    assert list(frequencies(choice(min_p=0.2, top_k=2, top_p=0.66))) == [0]
    assert list(frequencies(choice(min_p=0.4, top_k=4, top_p=0.99))) == [0, 1]


def test_the_fast_path_draws_what_the_whole_order_draws() -> None:
    """The path without a look at the device, as a GPU takes it, and the one over the likeliest few."""
    logits = torch.randn(64, 700, generator=torch.Generator().manual_seed(5)) * 3
    rows = [SampleRow(choice(0.8, top_p=0.7 + 0.3 * (n % 2), top_k=n % 5, seed=n), n) for n in range(64)]
    plan = plan_rows(rows, torch.device("cpu"))
    assert plan.drawn is not None
    scaled = torch.log_softmax(logits / plan.drawn.temperature, -1)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    whole = order.gather(1, pick(values.double().exp(), plan.drawn.filters, complete=True)[:, None]).squeeze(1)

    assert torch.equal(sample_rows(logits, plan).tokens, whole)
