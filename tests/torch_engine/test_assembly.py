"""What an engine chooses for a machine: by what is there, so that equal machines choose alike under any load."""

import gc
from pathlib import Path

import pytest
import torch

from gpu_worker.torch_engine.assembly import (
    assemble_for_good,
    available_bytes,
    choose_dtype,
    free_memory,
    machine_memory,
    usable_cores,
)
from gpu_worker.torch_engine.backends import kernel_threads, torch_threads
from gpu_worker.torch_engine.config import TorchEngineConfig
from tests.torch_engine.test_cgroups import v2, write
from tests.torch_engine.tiny import tiny_model


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


def test_what_is_loaded_for_good_is_not_looked_through_for_garbage(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    try:
        assert assemble_for_good(TorchEngineConfig(model_dir=tmp_path, capacity=1, warm_up=False)).core.idle
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
