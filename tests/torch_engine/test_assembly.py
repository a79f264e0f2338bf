"""What an engine chooses for a machine: by what is there, so that equal machines choose alike under any load."""

import gc
from pathlib import Path

import pytest
import torch

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.assembly import (
    assemble_for_good,
    available_bytes,
    choose_dtype,
    free_memory,
    machine_memory,
    usable_cores,
)
from gpu_worker.torch_engine.backends import choose_backend, kernel_threads, kv_memory, torch_threads, why_not_compiled
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.loader import load_weights
from gpu_worker.torch_engine.model_config import parse_config
from gpu_worker.torch_engine.text_model import read_json
from tests.torch_engine.test_cgroups import v2, write
from tests.torch_engine.tiny import engine_config, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_device_and_what_was_asked_for(wanted: str, device: str, chosen: torch.dtype) -> None:
    """A measurement under load would let two equal nodes differ, and a job that moves between them change its text."""
    assert choose_dtype(wanted, torch.device(device)) == chosen


def test_a_core_is_left_to_the_event_loop_where_a_step_waits_for_its_slowest_thread() -> None:
    assert [torch_threads(cores) for cores in (1, 2, 4, 8, 16)] == [1, 1, 3, 7, 14]
    assert [kernel_threads(cores) for cores in (1, 2, 4, 8, 16)] == [1, 2, 4, 7, 15]


def test_a_containers_quota_bounds_the_cores(tmp_path: Path) -> None:
    """Threads beyond it use it up early in each period, and then all of them stand still together."""
    write(tmp_path / "v2" / "small", cpu_max="50000 100000")
    write(tmp_path / "v2" / "large", cpu_max="100000000 100000")

    assert usable_cores(v2(tmp_path, "/small")) == 1
    assert usable_cores(v2(tmp_path, "/large")) == usable_cores(tmp_path / "none")


def test_a_containers_memory_bounds_what_is_free(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    write(tmp_path / "v2" / "small", memory_max=str(64 << 20), memory_current=str(24 << 20))

    assert free_memory(cpu, v2(tmp_path, "/small")) == 40 << 20
    assert free_memory(cpu, tmp_path / "none") == pytest.approx(machine_memory(), rel=0.2)


def test_memory_that_only_caches_files_counts_as_free() -> None:
    meminfo = "MemTotal:  24000 kB\nMemFree:  300 kB\nMemAvailable:  18000 kB\n"
    assert available_bytes(meminfo) == 18_000 * 1024
    with pytest.raises(ValueError, match="MemAvailable"):
        available_bytes("MemFree:  300 kB\n")


@pytest.mark.parametrize("tokens", [10**13, 10**18])
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("compiled", torch.float32), ("torch", torch.float32), ("torch", torch.bfloat16)]
)
def test_keys_and_values_that_fit_nowhere_are_refused_with_what_to_do(
    tmp_path: Path, kernels: str, tokens: int, dtype: torch.dtype
) -> None:
    """Not a traceback at each start: the sentence names the setting, whatever way the memory was asked for."""
    config = engine_config(tiny_model(tmp_path), kernels=kernels)
    shape = parse_config(read_json(tmp_path / "config.json"))
    if kernels == "compiled" and why_not_compiled(shape, dtype):
        pytest.skip("this machine cannot run the kernels")
    backend = choose_backend(shape, config, cores=1, device=CPU, dtype=dtype)
    weights = load_weights(tmp_path, shape, range(shape.layers), backend.factory, lambda fraction: None)

    with pytest.raises(EngineStartError, match=r"tokens, \d+\.\d GiB \(.+\): set MILLRACE_KV_TOKENS lower$"):
        backend.build(weights, tokens // backend.block_tokens, shape.context)


def test_what_a_gpu_cannot_hold_beside_keys_and_values_is_said_alike(tmp_path: Path) -> None:
    """Its pool, or the graphs that are recorded after it."""
    shape = parse_config(read_json(tiny_model(tmp_path) / "config.json"))

    with pytest.raises(
        EngineStartError, match=r"of 1024 tokens, .*CUDA out of memory\. .*: set MILLRACE_KV_TOKENS lower"
    ):
        with kv_memory(shape, 1024, torch.bfloat16):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")


def test_threads_without_end_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """A hundred thousand would be made for a while, and then fail."""
    shape = parse_config(read_json(tiny_model(tmp_path) / "config.json"))

    with pytest.raises(EngineStartError, match=r"MILLRACE_THREADS=9 is more than 4 a core, .* may use 2: set it to 2"):
        choose_backend(shape, engine_config(tmp_path, threads=9), cores=2, device=CPU, dtype=torch.float32)


def test_what_is_loaded_for_good_is_not_looked_through_for_garbage(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    try:
        assert assemble_for_good(TorchEngineConfig(model_dir=tmp_path, capacity=1, warm_up=False)).core.idle
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
