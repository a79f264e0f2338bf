"""Penalties and logit_bias against their formulas, written out token by token."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from gpu_worker.torch_engine.penalties import adjust, plan_adjustments
from gpu_worker.torch_engine.sampler import SampleRow, plan_rows, sample_rows
from gpu_worker.torch_engine.sequence import SamplingChoice
from gpu_worker.torch_engine.sequence import Sequence as Generation
from gpu_worker.torch_engine.token_history import TokenHistory

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])


def choice(**changes: object) -> SamplingChoice:
    return SamplingChoice(temperature=0.0, top_p=1.0, top_k=0, seed=0, **changes)  # type: ignore[arg-type]


def history_of(one: SamplingChoice, prompt: Sequence[int], answer: Sequence[int]) -> TokenHistory | None:
    return Generation("a", [*prompt, *answer], len(prompt), 0, 99, one).history()


def row_of(one: SamplingChoice, position: int, prompt: Sequence[int], answer: Sequence[int]) -> SampleRow:
    return SampleRow(one, position, history_of(one, prompt, answer))


def adjusted(one: SamplingChoice, prompt: Sequence[int] = (), answer: Sequence[int] = ()) -> list[float]:
    plan = plan_adjustments([(0, one, history_of(one, prompt, answer), ())], CPU)
    assert plan is not None
    return [round(value, 5) for value in adjust(LOGITS[None], plan, None)[0].tolist()]


def test_frequency_counts_each_time_and_presence_once() -> None:
    both = choice(frequency_penalty=0.5, presence_penalty=0.25)

    assert adjusted(both, answer=[0, 0, 3]) == [2 - 1.0 - 0.25, -1, 0.5, 3 - 0.5 - 0.25, -2]


def test_of_the_prompt_they_count_nothing() -> None:
    assert adjusted(choice(frequency_penalty=0.5, presence_penalty=0.25), prompt=[0, 1]) == LOGITS.tolist()


def test_a_repetition_penalty_weakens_what_prompt_or_answer_hold() -> None:
    """Above 0 divided, below multiplied, once however often the token came."""
    assert adjusted(choice(repetition_penalty=2.0), prompt=[0, 1, 1], answer=[1, 2]) == [1, -2, 0.25, 3, -2]


def test_a_bias_is_added_before_the_penalties() -> None:
    one = choice(logit_bias=((0, -3.0), (4, 100.0)), repetition_penalty=2.0)

    assert adjusted(one, answer=[0, 4]) == [-2, -1, 0.5, 3, 49]


def test_a_token_that_the_host_does_not_know_yet_counts_too() -> None:
    one = choice(frequency_penalty=1.0, repetition_penalty=2.0)
    plan = plan_adjustments([(1, one, history_of(one, [], [0, 3]), ())], CPU)
    assert plan is not None
    logits = LOGITS.expand(2, -1)

    known = adjust(logits, plan, torch.tensor([-1, -1]))[0].tolist()
    with_late = adjust(logits, plan, torch.tensor([-1, 3]))[0].tolist()

    assert known == [0, -1, 0.5, 0.5, -2]
    assert with_late == [0, -1, 0.5, -0.5, -2]


def test_only_the_rows_that_ask_change_and_their_log_probabilities_are_of_the_raw_logits() -> None:
    rows = [
        SampleRow(choice(logprobs=2), 0),
        row_of(choice(logprobs=2, logit_bias=((3, -100.0),)), 0, [], []),
        row_of(choice(presence_penalty=2.0), 1, [], [3]),
    ]
    logits = LOGITS.expand(3, -1).clone()

    sampled = sample_rows(logits, plan_rows(rows, CPU))

    assert sampled.tokens.tolist() == [3, 0, 0]
    assert sampled.scores is not None
    raw = torch.log_softmax(LOGITS, -1)
    assert sampled.scores.logprobs.flatten().tolist() == [float(raw[3]), float(raw[0])]
    assert torch.equal(logits, LOGITS.expand(3, -1))


def test_nobody_who_asks_for_nothing_pays() -> None:
    assert plan_adjustments([(0, choice(), None, ())], CPU) is None
    assert plan_rows([SampleRow(choice(), 0)], CPU).scored is None


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_a_negative_penalty_is_an_encouragement(penalty: str) -> None:
    assert adjusted(choice(**{penalty: -2.0}), answer=[2])[2] == 2.5


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 2.0, "frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"repetition_penalty": 0.01, "logit_bias": ((0, 100.0), (3, -100.0))},
    ],
)
def test_no_parameter_makes_a_sound_row_look_broken(extreme: dict[str, object], temperature: float) -> None:
    """A node whose logits are not finite is taken out of service; a request must not be able to bring that about."""
    row = row_of(dataclasses.replace(choice(**extreme), temperature=temperature), 4, [1], [0, 3, 3, 0])

    for logits in (LOGITS, LOGITS * 1e38):
        sampled = sample_rows(logits[None].clone(), plan_rows([row], CPU))
        assert sampled.tokens.item() in range(5)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_broken_row_stays_broken_whatever_is_asked(poison: float) -> None:
    row = row_of(choice(repetition_penalty=1.5, logit_bias=((2, -100.0),)), 1, [], [2])
    logits = LOGITS.clone()
    logits[2] = poison

    assert sample_rows(logits[None], plan_rows([row], CPU)).tokens.tolist() == [-1]


def test_counts_grow_with_the_answer_and_drafts_count_only_in_their_step() -> None:
    one = choice(frequency_penalty=0.5, repetition_penalty=2.0)
    sequence = Generation("a", [1, 1, 40, 3], 2, 0, 999, one)
    for token in [n % 37 for n in range(200)]:
        history = sequence.history()
        for drafts in [(), (3, 3, 44)]:
            plan = plan_adjustments([(0, one, history, drafts)], CPU)
            assert plan is not None
            logits = torch.full((1, 50), 8.0)
            answer = [*sequence.tokens[2:], *drafts]
            seen = {1, *answer}
            expected = [(4.0 if n in seen else 8.0) - 0.5 * answer.count(n) for n in range(50)]
            assert adjust(logits, plan, None)[0].tolist() == expected
        sequence.tokens.append(token)
