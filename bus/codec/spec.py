"""What is fixed of a job at its submit, and travels with it as one text. `_base.lua` describes it too."""

from collections.abc import Iterable

import msgspec

from bus.codec.fields import COUNT_MAX, MOMENT_MAX, within
from bus.jobs import Capability

SEED_MAX = 2**63 - 1
FLAG_OF: dict[Capability, str] = {"logprobs": "l"}  # among the flags; `_able.lua` says the same


def flags_of(needs: Iterable[Capability]) -> str:
    return "".join(FLAG_OF[need] for need in needs)


class Spec(msgspec.Struct, frozen=True):
    """In the job hash and in the node's entry."""

    model: str
    stream: bool
    policy: str
    seed: int
    created_ms: int
    deadline_ms: int
    est_prompt: int
    est_new: int
    logprobs: bool = False  # it asks for log probabilities


def parse_spec(text: str) -> Spec:
    """Raises ValueError on a foreign text."""
    model, flags, policy, seed, created, deadline, est_prompt, est_new = text.split(" ")
    return Spec(
        model=model,
        stream="s" in flags,
        policy=policy,
        seed=within(int(seed), SEED_MAX, -SEED_MAX - 1),
        created_ms=within(int(created), MOMENT_MAX),
        deadline_ms=within(int(deadline), MOMENT_MAX),
        est_prompt=within(int(est_prompt), COUNT_MAX),
        est_new=within(int(est_new), COUNT_MAX),
        logprobs=FLAG_OF["logprobs"] in flags,
    )
