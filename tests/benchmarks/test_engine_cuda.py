"""The benchmark of a GPU, as far as a CPU can tell: it runs, and says why it does not measure."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import engine_cuda
from gpu_worker.torch_engine.config import TorchEngineConfig

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_cuda"])

    engine_cuda.main()

    assert capsys.readouterr().out.startswith("skipped: ")


def test_it_measures_a_model_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    (tmp_path / "config.json").write_text(json.dumps(engine_cuda.EIGHT_BILLION | SMALL))
    monkeypatch.setattr(engine_cuda, "RUNNING", 2)
    monkeypatch.setattr(engine_cuda, "LONG_PROMPT", 40)
    config = TorchEngineConfig(model_dir=tmp_path, capacity=4, kernels="torch")
    bench = engine_cuda.build(config, device=torch.device("cpu"), dtype=torch.float32)
    options = argparse.Namespace(concurrent=3, new=12, seconds=0.3, seed=1)

    alone, together, beside = engine_cuda.own_lines(bench, 1e10, options)

    assert bench.weight_bytes == 4 * (64 * (2 * ((2 * 4 + 2 * 2) * 16 + 3 * 96) + 300))
    assert alone.startswith("1 at once: ")
    assert together.startswith("3 at once: ")
    assert beside.startswith("2 answers while 1 prompts of 40 arrive: ")
    assert bench.core.idle
