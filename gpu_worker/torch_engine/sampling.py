"""What a request leaves open about sampling is the model's own: its generation config. No torch."""

import dataclasses
from typing import Any

from bus.jobs import ChatJob
from gpu_worker.torch_engine.sequence import SamplingChoice


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """The fields of a generation config that have a counterpart in a request."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def resolve(self, job: ChatJob, seed: int) -> SamplingChoice:
        wanted = job.sampling
        chosen = {
            field.name: default if (asked := getattr(wanted, field.name)) is None else asked
            for field in dataclasses.fields(self)
            for default in (getattr(self, field.name),)
        }
        return SamplingChoice(
            **chosen,
            seed=seed,
            presence_penalty=wanted.presence_penalty or 0.0,
            frequency_penalty=wanted.frequency_penalty or 0.0,
            logit_bias=wanted.logit_bias,
            logprobs=job.logprobs,
        )


def parse_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """generation: the fields of generation_config.json."""
    names = [field.name for field in dataclasses.fields(SamplingDefaults)]
    known = {name: generation[name] for name in names if generation.get(name) is not None}
    return SamplingDefaults(**(known | ({"temperature": 0.0} if generation.get("do_sample") is False else {})))
