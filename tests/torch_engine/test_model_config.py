"""config.json as it is published: both spellings, all kinds of scaling, and no field that changes numbers left out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from tests.torch_engine.tiny import CONFIG

MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SHORT, LONG = [1.0] * 8, [2.0] * 8
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


def parsed(**changes: Any) -> ModelConfig:
    return parse_config(CONFIG | {"vocab_size": 9} | changes)


def test_the_old_spelling_and_that_of_transformers_5_are_one() -> None:
    old = parsed(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    older_values_inside = parsed(rope_theta=5e5, rope_scaling={"rope_type": "linear", "type": "linear", "factor": 2.0})
    new = parsed(rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})

    assert old == older_values_inside == new
    assert old.rope.frequencies[1] == pytest.approx(5e5 ** (-2 / 16) / 2)


def test_theta_inside_the_parameters_counts_more_than_outside() -> None:
    """As in transformers, which writes both now and then."""
    inside = parsed(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})

    assert inside.rope == parsed(rope_theta=1e6).rope


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    """Qwen's cards say: add the scaling, leave max_position_embeddings."""
    config = parsed(rope_scaling=YARN)

    assert config.context == 4096
    assert config.rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert parsed(rope_scaling=YARN, max_position_embeddings=8192).context == 8192


def test_an_attn_factor_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Published with YaRN; transformers warns of it and goes on. What it does heed is called attention_factor."""
    assert parsed(rope_scaling=YARN | {"attn_factor": 0.88}) == parsed(rope_scaling=YARN)
    assert [record for record in caplog.records if "attn_factor is left out" in record.message]


def test_dynamic_scaling_ends_where_it_would_begin() -> None:
    """Beyond the trained length its numbers change with every token, and cached keys would not."""
    config = parsed(rope_scaling={"rope_type": "dynamic", "factor": 4.0})

    assert config.rope == parsed().rope
    assert config.context == CONFIG["max_position_embeddings"]


def test_longrope_ends_where_its_other_factors_would_begin() -> None:
    bounded = parsed(rope_scaling=LONGROPE, original_max_position_embeddings=256)
    free = parsed(rope_scaling=LONGROPE | {"long_factor": SHORT, "original_max_position_embeddings": 256})

    assert bounded.context == 256
    assert free.context == CONFIG["max_position_embeddings"]
    assert bounded.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        (MISTRAL, 1024),
        (MISTRAL | {"sliding_window": 128}, 128),
        (MISTRAL | {"sliding_window": 4096}, 1024),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}, 4096),
        (QWEN2 | {"sliding_window": 128}, 1024),
        (QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, 128),
        (QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3}, 1024),
        (QWEN3 | {"sliding_window": 128, "use_sliding_window": True}, 1024),
        (QWEN3 | {"sliding_window": 128, "layer_types": ["full_attention"] * 3}, 1024),
        (QWEN3 | {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]}, 128),
        ({"sliding_window": 128}, 1024),
    ],
)
def test_the_context_ends_at_the_window_of_the_layers_that_have_one(changes: dict[str, Any], context: int) -> None:
    """Inside the window all attention is full attention; beyond it we would be wrong. Llama has no windows."""
    assert parsed(**changes).context == context


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope type 'mrope'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "'default' with mrope_section"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "'linear' with beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attn_factor": 0.9}}, "'linear' with attn_factor"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "full_attention"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "need 8 numbers"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling: factor must be a number, not '2'"),
        ({"rope_scaling": YARN | {"beta_fast": float("nan")}}, "rope_scaling: beta_fast must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4"),
        ({"layer_types": ["linear_attention"]}, "layer type 'linear_attention'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"logits_scaling": 8}, "logits_scaling"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"num_hidden_layers": "many"}, "bad field: num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, not 0"),
        ({"hidden_size": 64.5}, "hidden_size must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings must be a whole number"),
        ({"num_attention_heads": -4}, "num_attention_heads must be"),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be"),
        ({"head_dim": [16]}, "head_dim must be"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be"),
        ({"rms_norm_eps": None}, "bad field"),
    ],
)
def test_what_would_change_numbers_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineStartError, match=said):
        parsed(**changes)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(EngineStartError, match="missing field: 'vocab_size'"):
        parse_config(CONFIG)


def test_what_is_off_or_harmless_is_no_reason_to_refuse(caplog: pytest.LogCaptureFixture) -> None:
    """As published: fields of the trainer, and switches that are off. What nobody knows is said."""
    published: dict[str, Any] = {
        "rope_interleaved": False,
        "is_llama_config": True,
        "residual_multiplier": 1.0,
        "pretraining_tp": 1,
    }
    published |= {
        "transformers.js_config": {"dtype": "q4"},
        "use_mrope": False,
        "num_experts": 0,
        "hidden_act": "swish",
    }

    assert parsed(**published, my_note="hello") == parsed()
    assert [record.__dict__["fields"] for record in caplog.records] == ["my_note"]


@pytest.mark.parametrize(
    ("changes", "biased"),
    [
        (QWEN2, (True, False, False)),
        (QWEN2 | {"attention_bias": True}, (True, False, False)),
        (QWEN3 | {"attention_bias": True, "mlp_bias": True}, (True, True, False)),
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        (MISTRAL | {"attention_bias": True}, (False, False, False)),
    ],
)
def test_biases_are_where_each_architecture_has_them(changes: dict[str, Any], biased: tuple[bool, bool, bool]) -> None:
    """A field that the architecture does not heed turns nothing on."""
    config = parsed(**changes)

    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == biased


def test_the_default_model_is_taken_as_it_is_published(real_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = parse_config(json.loads((real_model_dir / "config.json").read_text()))

    assert (config.layers, config.context, config.tied_head) == (30, 8192, True)
    assert not caplog.records
