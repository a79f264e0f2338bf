"""What a request leaves open about sampling is the model's own: its generation config. No torch."""

import dataclasses
from typing import Any

from bus.jobs import REPETITION_PENALTY_MIN, ChatJob
from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.sequence import SamplingChoice

# What the sampler computes with in float32, wider than what a request may ask for.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),  # -1, as vLLM has it, is 0 here: off
    "min_p": (0.0, 1.0),
    "repetition_penalty": (REPETITION_PENALTY_MIN, 100.0),
}


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
    """generation: the fields of generation_config.json. Raises EngineStartError naming the one that is out of range."""
    known = {name: _in_range(name, generation[name]) for name in RANGES if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        known["temperature"] = 0.0
    if "top_k" in known:
        known["top_k"] = max(0, int(known["top_k"]))
    return SamplingDefaults(**known)


def _in_range(name: str, value: Any) -> Any:
    least, most = RANGES[name]
    kinds = int if name == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "an integer" if name == "top_k" else "a number"
        message = f"generation_config.json: {name} must be {kind} from {least:g} to {most:g}, not {value!r}"
        raise EngineStartError(message)
    return value
