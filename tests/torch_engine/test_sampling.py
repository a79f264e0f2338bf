"""A model's own sampling defaults: what is taken from its generation config, and what is refused."""

import pytest

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.sampling import SamplingDefaults, parse_defaults


def test_what_a_generation_config_says_is_the_default() -> None:
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "eos": 3}

    assert parse_defaults(fields) == SamplingDefaults(0.6, 0.95, 20, repetition_penalty=1.1)
    assert parse_defaults({"do_sample": False, "temperature": None, "top_k": -1}) == SamplingDefaults(0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_p", "0.9"),
        ("top_k", 2.5),
        ("top_k", True),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_value_that_cannot_be_computed_with_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(EngineStartError, match=f"generation_config.json: {name} must be"):
        parse_defaults({name: value})
