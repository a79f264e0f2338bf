"""Whole lives of the engine at random: arrivals, ends of every kind, cancels, resumed answers, pools too small, chunks
of any size, guesses, steps in flight. Every answer is the one that the same request gets alone.

The model (slot_model.py) says what it reads in its slots, so a block in wrong hands changes a text. Seeds are printed
with a failure: `lives(seed)` is all of one life.
"""

import dataclasses
import random
from pathlib import Path

import pytest

from bus.jobs import Sampling
from gpu_worker.engine import GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.prompt import Answer, prepare
from tests.torch_engine.slot_model import slot_engine
from tests.torch_engine.tiny import GREEDY, Outcome, deliver, request, run

SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.8),
    Sampling(temperature=1.5, top_k=3),
    Sampling(temperature=0.7, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2),
]
LETTERS = "abcdefghi"
STEPS_MAX = 20_000


@dataclasses.dataclass(frozen=True)
class Visit:
    """One request of a life."""

    wanted: GenerateRequest
    arrives: int  # step
    leaves_at: int | None  # cancelled when its answer has so many tokens


@dataclasses.dataclass(frozen=True)
class Life:
    visits: list[Visit]
    blocks: int
    block_tokens: int
    capacity: int
    chunk_max: int
    prefix_cache: bool
    speculate: int
    depth: int

    def engine(self, directory: Path) -> Assembled:
        return slot_engine(
            directory,
            blocks=self.blocks,
            block_tokens=self.block_tokens,
            capacity=self.capacity,
            chunk_max=self.chunk_max,
            prefix_cache=self.prefix_cache,
            speculate=self.speculate,
            depth=self.depth,
            eos=self.eos(directory),
        )

    def lonely(self, directory: Path) -> Assembled:
        """Nothing shared, nothing cut, nothing guessed, nothing in flight; the same context."""
        return slot_engine(
            directory,
            blocks=self.blocks,
            block_tokens=self.block_tokens,
            chunk_max=10_000,
            prefix_cache=False,
            eos=self.eos(directory),
        )

    def eos(self, directory: Path) -> frozenset[int]:
        return frozenset(slot_engine(directory, blocks=1).text.encode("h", special=False))


def life(seed: int, directory: Path) -> Life:
    chance = random.Random(seed)
    blocks, block_tokens = chance.choice([(8, 4), (20, 4), (10, 8), (40, 16)])
    empty = Life(
        visits=[],
        blocks=blocks,
        block_tokens=block_tokens,
        capacity=chance.choice([1, 3, 8, 8]),
        chunk_max=chance.choice([1, 3, 8, 40, 500]),
        prefix_cache=chance.random() < 0.7,
        speculate=chance.choice([0, 1, 4, 8]),
        depth=chance.choice([0, 1]),
    )
    shared = "".join(chance.choices(LETTERS, k=20))
    visits = [visit(str(n), chance, empty, shared, directory) for n in range(chance.randrange(1, 9))]
    return dataclasses.replace(empty, visits=visits)


def visit(name: str, chance: random.Random, life: Life, shared: str, directory: Path) -> Visit:
    prompt_max = life.blocks * life.block_tokens - 1
    text = shared[: chance.choice([0, 0, 5, 20])] + "".join(chance.choices(LETTERS, k=chance.randrange(1, 60)))
    wanted = request(
        name,
        "",
        messages=(),
        prompt=text[: min(prompt_max, chance.choice([10, 10, 200]))],
        max_tokens=chance.choice([1, 9, 30, 30, None]),
        sampling=chance.choice(SAMPLINGS),
        stop=tuple("".join(chance.choices(LETTERS, k=3)) for _ in range(chance.choice([0, 0, 1, 2]))),
        ignore_eos=chance.random() < 0.6,
        seed=chance.randrange(1 << 32),
    )
    if chance.random() < 0.3:
        whole = run(life.lonely(directory), [wanted])[name]
        wanted = resumed(wanted, whole.tokens[: chance.randrange(len(whole.tokens) + 1)])
    leaves = chance.randrange(0, 40) if chance.random() < 0.2 else None
    return Visit(wanted, chance.randrange(0, 20), leaves)


def resumed(wanted: GenerateRequest, forced: list[int]) -> GenerateRequest:
    return GenerateRequest(wanted.sequence, wanted.job, seed=wanted.seed, forced_tokens=tuple(forced))


def live(engine: Assembled, visits: list[Visit]) -> dict[str, Outcome]:
    """Steps until all have ended; books are checked after each."""
    outcomes = {one.wanted.sequence: Outcome(one.wanted) for one in visits}
    for step in range(STEPS_MAX):
        for one in visits:
            outcome = outcomes[one.wanted.sequence]
            if one.arrives == step:
                answer = prepare(one.wanted, engine.text, context_max=engine.context)
                assert isinstance(answer, Answer), answer
                deliver(engine.core.add(answer), outcomes)
            if one.leaves_at is not None and step >= one.arrives and len(outcome.tokens) >= one.leaves_at:
                deliver(engine.core.cancel(one.wanted.sequence), outcomes)
        deliver(engine.core.step().pieces, outcomes)
        engine.core.scheduler.check_integrity()
        if engine.core.idle and step >= max(one.arrives for one in visits):
            return outcomes
    raise AssertionError("the engine does not come to an end")


def check(seed: int, directory: Path) -> Assembled:
    one = life(seed, directory)
    engine = one.engine(directory)

    outcomes = live(engine, one.visits)

    for visit in one.visits:
        name = visit.wanted.sequence
        found, alone = outcomes[name], run(one.lonely(directory), [visit.wanted])[name]
        about = f"life({seed}), sequence {name}"
        assert found.end is not None, about
        if found.end.reason == "cancelled":
            assert found.tokens == alone.tokens[: len(found.tokens)], about
            assert alone.text.startswith(found.text), about
        else:
            assert (found.tokens, found.text, found.end) == (alone.tokens, alone.text, alone.end), about
    pool = engine.core.scheduler.pool
    assert pool.free == pool.total, f"life({seed})"
    return engine


def check_all(seeds: range, directory: Path) -> None:
    engines = [check(seed, directory) for seed in seeds]

    assert sum(engine.core.scheduler.preemptions for engine in engines) > len(seeds) / 10, "pools are not small enough"
    assert sum(engine.core.accepted for engine in engines) > len(seeds), "hardly a guess was right"
    assert sum(engine.core.drafted - engine.core.accepted for engine in engines) > len(seeds), "hardly one was wrong"


def test_every_answer_is_the_one_that_it_gets_alone(model_dir: Path) -> None:
    check_all(range(12), model_dir)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(1, 4))
def test_in_hundreds_of_lives_too(model_dir: Path, hundred: int) -> None:
    check_all(range(100 * hundred, 100 * hundred + 100), model_dir)
