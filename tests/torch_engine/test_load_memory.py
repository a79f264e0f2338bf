"""What loading a model takes: about the memory that the model is kept in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.loader import MAPPED_BYTES_MAX
from tests.torch_engine.tiny import CONFIG, tiny_tensors

MIB = 1 << 20
VOCABULARY, HIDDEN = 2048, 1024
LOAD = """
import json, sys
from contextlib import suppress
from pathlib import Path
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder
from gpu_worker.torch_engine.kernels.packing import PackedFactory
from gpu_worker.torch_engine.loader import load_weights
from gpu_worker.torch_engine.model_config import parse_config

def status(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

directory = Path(sys.argv[1])
config = parse_config(json.loads((directory / "config.json").read_text()))
with suppress(OSError):  # not every container lets a process forget its peak
    Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
weights = load_weights(directory, config, range(config.layers), PackedFactory(), lambda fraction: None)
decoder = CompiledDecoder(config, weights, blocks=1, context=int(sys.argv[2]), threads=1)
print(status("VmHWM") - before, weights.bytes_read)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what a process took at most is Linux's to say")
def test_a_model_is_never_there_twice(tmp_path: Path) -> None:
    """Copies of a layer in other forms, or of all layers, would keep models out of machines that can hold them."""
    config = CONFIG | {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "num_hidden_layers": 5,
    }
    tensors = tiny_tensors(config, seed=0)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))

    said = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(BLOCK_TOKENS)], capture_output=True, check=True
    )

    peak, kept = map(int, said.stdout.split())
    embedding = 2 * VOCABULARY * HIDDEN
    assert kept > 180 * MIB
    assert peak < kept + embedding + MAPPED_BYTES_MAX + 48 * MIB  # of these a matrix, 24, and what else there is
