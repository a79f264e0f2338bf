"""The perplexity that benchmarks print is what its definition says, however the text is cut into steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.perplexity import FORMS, TEXT, measure, perplexity
from tests.torch_engine.reference import reference_logits
from tests.torch_engine.tiny import tiny_engine

TEXT_LENGTH = 7766


@pytest.mark.parametrize("rows", [1, 50, 1000])
def test_perplexity_is_that_of_the_reference(model_dir: Path, rows: int) -> None:
    """Two windows, the second shorter; the first token of each is not scored."""
    tokens = [3 + (7 * n * n + n) % 250 for n in range(150)]
    engine = tiny_engine(model_dir)
    blocks = engine.core.scheduler.pool.take(4)

    found = perplexity(engine.model, blocks, tokens, window=100, rows=rows)

    config = json.loads((model_dir / "config.json").read_text())
    losses = []
    for part in (tokens[:100], tokens[100:]):
        logits = reference_logits(config, load_file(model_dir / "model.safetensors"), part)
        likelihoods = torch.log_softmax(logits, -1)
        losses += [-float(likelihoods[place, token]) for place, token in enumerate(part[1:])]
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_the_text_stays_as_it_is() -> None:
    """Figures of another text cannot be compared; a change of it changes this number too."""
    assert len(TEXT.read_text(encoding="utf-8")) == TEXT_LENGTH


@pytest.mark.slow
def test_bfloat16_costs_the_default_model_little(real_model_dir: Path) -> None:
    values = {form: measure(real_model_dir, form, threads=1) for form in FORMS if form != "compiled"}

    assert 5 < values["float32"] < 40
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.02)
