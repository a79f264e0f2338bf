"""What an engine chooses for a machine: by what is there, so that equal machines choose alike under any load."""

import pytest
import torch

from gpu_worker.torch_engine.assembly import available_bytes, choose_dtype, default_threads


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


def test_a_core_is_left_to_the_event_loop() -> None:
    assert [default_threads(cores) for cores in (1, 2, 4, 8, 16)] == [1, 1, 3, 7, 14]


def test_memory_that_only_caches_files_counts_as_free() -> None:
    meminfo = "MemTotal:  24000 kB\nMemFree:  300 kB\nMemAvailable:  18000 kB\n"
    assert available_bytes(meminfo) == 18_000 * 1024
    with pytest.raises(ValueError, match="MemAvailable"):
        available_bytes("MemFree:  300 kB\n")
