"""One answer, the same tokens, however it is computed. The fleet's kill tests rest on this.

Greedy in float32 unless a test says otherwise; `alone` is the answer of a sequence that never shared a step.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from bus.jobs import Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled
from tests.torch_engine.tiny import request, run, tiny_engine

TEXTS = [f"{n} " + "the river and the mill " * (n % 7) + "turn" * (n % 3) for n in range(24)]


def requests(**job: Any) -> list[GenerateRequest]:
    return [request(str(n), text, seed=n, **job) for n, text in enumerate(TEXTS)]


def answers(engine: Assembled, wanted: list[GenerateRequest]) -> dict[str, list[int]]:
    return {name: outcome.tokens for name, outcome in run(engine, wanted).items()}


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> dict[str, list[int]]:
    engine = tiny_engine(model_dir, prefix_cache=False, prefill_chunk=4096)
    return {name: tokens for wanted in requests() for name, tokens in answers(engine, [wanted]).items()}


def test_the_answers_differ_from_prompt_to_prompt(alone: dict[str, list[int]]) -> None:
    """Else the tests of this file would prove nothing."""
    assert len({tuple(tokens) for tokens in alone.values()}) == len(TEXTS)
    assert all(len(set(tokens)) > 5 for tokens in alone.values())


@pytest.mark.parametrize("capacity", [2, 3, 5, 8, 16])
def test_batched_with_others(model_dir: Path, alone: dict[str, list[int]], capacity: int) -> None:
    assert answers(tiny_engine(model_dir, capacity=capacity), requests()) == alone


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_prefilled_in_chunks(model_dir: Path, alone: dict[str, list[int]], chunk: int) -> None:
    some = requests()[1:7]

    assert answers(tiny_engine(model_dir, prefill_chunk=chunk), some) == {r.sequence: alone[r.sequence] for r in some}


def test_preempted_again_and_again(model_dir: Path) -> None:
    """Four answers grow until the blocks run out; each is computed again later and loses nothing."""
    wanted = [request(str(n), f"{n} and on", max_tokens=90) for n in range(6)]
    roomy = tiny_engine(model_dir, prefix_cache=False)
    alone = {name: tokens for one in wanted for name, tokens in answers(roomy, [one]).items()}
    tight = tiny_engine(model_dir, kv_tokens=320)

    assert answers(tight, wanted) == alone
    assert tight.core.scheduler.preemptions > 1


def test_from_the_prefix_cache(model_dir: Path, alone: dict[str, list[int]]) -> None:
    engine = tiny_engine(model_dir)
    answers(engine, requests())

    assert answers(engine, requests()) == alone
    assert engine.core.scheduler.pool.idle


def test_resumed_on_another_engine_at_every_place(model_dir: Path, alone: dict[str, list[int]]) -> None:
    engine = tiny_engine(model_dir)
    chance = random.Random(1)
    resumed = []
    for n, text in enumerate(TEXTS):
        forced = alone[str(n)][: chance.randrange(1, 24)]
        resumed.append(request(str(n), text, seed=n, forced=forced, shown=b""))

    assert answers(engine, resumed) == alone


def test_seeded_sampling_is_the_same_alone_batched_and_resumed(model_dir: Path) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50)
    engine = tiny_engine(model_dir, prefix_cache=False)
    alone = {n: t for wanted in requests(sampling=sampling) for n, t in answers(engine, [wanted]).items()}

    batched = answers(tiny_engine(model_dir), requests(sampling=sampling))
    half = [request(str(n), text, seed=n, forced=alone[str(n)][:11], sampling=sampling) for n, text in enumerate(TEXTS)]
    resumed = answers(tiny_engine(model_dir, prefill_chunk=20), half)

    assert batched == alone
    assert resumed == alone
    other_seed = answers(engine, [request("0", TEXTS[0], seed=99, sampling=sampling)])
    assert other_seed["0"] != alone["0"]


def test_the_text_is_the_same_when_resumed_within_a_character(model_dir: Path) -> None:
    """Tokens may be ahead of the text that was shown: half a character was held back."""
    engine = tiny_engine(model_dir)
    whole = run(engine, [request("a", "bytes", max_tokens=60)])["a"]
    for kept in range(1, 60, 4):
        shown = b"".join(p.text for p in whole.pieces if p.token_offset + len(p.tokens) <= kept)

        resumed = run(engine, [request("a", "bytes", max_tokens=60, forced=whole.tokens[:kept], shown=shown)])["a"]

        assert resumed.text == whole.text
        assert resumed.tokens == whole.tokens
