"""The benchmark of a GPU, as far as a CPU can tell: it runs, and says why it does not measure."""

import argparse
import json
import random
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
    "max_position_embeddings": 256,
}
PEER = """
import json, sys
print(json.dumps({"version": "peer 1"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    arrivals = [[[0.1 * n, 1] for n in range(1, asked["new"] + 1)] for _ in asked["prompts"]]
    print(json.dumps({"arrivals": arrivals}), flush=True)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_cuda"])

    engine_cuda.main()

    assert capsys.readouterr().out.startswith("skipped: ")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny models, short prompts, and a folder of its own for what the benchmark writes."""
    torch.set_num_threads(1)
    shape = engine_cuda.EIGHT_BILLION | SMALL
    monkeypatch.setattr(engine_cuda, "SHAPES", {"8b": shape, "default": shape | {"num_hidden_layers": 1}})
    monkeypatch.setattr(engine_cuda, "BENCH_FOLDER", tmp_path)
    monkeypatch.setattr(engine_cuda, "RUNNING", 2)
    monkeypatch.setattr(engine_cuda, "LONG_PROMPT", 40)


def run_of(**others: object) -> engine_cuda.Run:
    options = {"models": "default", "model": Path("missing"), "concurrent": 3, "new": 12, "seconds": 0.3, "seed": 1}
    options |= {"limit_s": 60.0, "peer_python": "no-such-python", **others}
    return engine_cuda.Run(argparse.Namespace(**options), torch.device("cpu"), torch.bfloat16, roof=1e10)


@pytest.mark.usefixtures("small")
def test_it_measures_a_model_with_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of()

    engine_cuda.measure_all(run)

    model, alone, together, beside, peer = (line for line in capsys.readouterr().out.splitlines() if line)
    assert model.startswith("default: 0.0 GiB of weights, random; attention ")
    assert alone.startswith("1 at once: ")
    assert together.startswith("3 at once: ")
    assert beside.startswith("2 answers while 1 prompts of 40 arrive in 0.")
    assert beside.endswith(" 0 preempted")
    assert peer.startswith("default: transformers skipped: no venv of it")
    assert "default" in run.rates


@pytest.mark.usefixtures("small")
def test_no_answer_is_preempted_before_the_context_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(engine_cuda.SHAPES["8b"]))
    config = TorchEngineConfig(model_dir=tmp_path, capacity=4, kernels="torch")
    bench = engine_cuda.build(config, device=torch.device("cpu"), dtype=torch.float32)

    stalls = engine_cuda.stalls_beside_prompts(bench, 60.0, random.Random(1))

    assert bench.weight_bytes == 4 * (64 * (2 * ((2 * 4 + 2 * 2) * 16 + 3 * 96) + 300))
    assert stalls.seconds < 60, "it ends with the answers"
    assert len(stalls.gaps_ms) > 2 * (256 - 128 - 10)
    assert stalls.preemptions == 0
    assert bench.core.idle


@pytest.mark.usefixtures("small")
def test_a_part_without_time_and_one_that_fails_leave_the_others_theirs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_cuda.measure_all(run_of(limit_s=0.0, models="8b,default"))

    lines = capsys.readouterr().out.splitlines()
    assert sum("its share of the time is over: 2 at once" in line for line in lines) == 2

    shapes = {**engine_cuda.SHAPES, "8b": {"architectures": ["Unknown"]}}
    monkeypatch.setattr(engine_cuda, "SHAPES", shapes)
    run = run_of(models="8b,default")
    engine_cuda.measure_all(run)

    assert "the rest of it skipped: EngineStartError" in capsys.readouterr().out
    assert list(run.rates) == ["default"]


@pytest.mark.usefixtures("small")
def test_the_peer_that_is_named_runs_with_the_models_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cuda, "PEERS_FOLDER", tmp_path)
    (tmp_path / "transformers_cuda.py").write_text(PEER)
    run = run_of(peer_python=sys.executable, concurrent=2, new=16)
    run.rates["default"] = 30.0

    line = engine_cuda.peer_line(run, engine_cuda.subject("default", run.options), 60.0)

    assert line == "peer 1, continuous batching, 2 at once: 20 tokens/s; ours 30 is 1.5 times that"


@pytest.mark.usefixtures("small")
def test_a_peer_that_hangs_is_ended_and_what_it_said_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cuda, "PEERS_FOLDER", tmp_path)
    monkeypatch.setattr(engine_cuda, "CLOSE_LIMIT_S", 0.05)
    (tmp_path / "transformers_cuda.py").write_text(
        "import sys, time\nprint('loading', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    run = run_of(peer_python=sys.executable)

    line = engine_cuda.peer_line(run, engine_cuda.subject("default", run.options), 0.5)

    assert line.startswith("transformers skipped: no answer within 0 s")
    assert line.endswith("loading")
