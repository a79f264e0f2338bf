"""What this machine can do at all, measured by torch: memory bandwidth and float32 products, by number of threads."""

import dataclasses
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ARRAY_VALUES = 64 << 20  # float32: 256 MiB, more than any cache
MATRIX = 1024
REPEATS = 5
TRIAL_S = 1.0  # goes on so long: on a machine that is shared the best of many is nearer to the roof
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclasses.dataclass(frozen=True)
class Roof:
    threads: int
    read: float  # bytes/s
    copy: float  # bytes/s, read and written ones
    product: float  # float32 operations/s

    @property
    def bandwidth(self) -> float:
        return max(self.read, self.copy)


def measure_roof(threads: int) -> Roof:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(ARRAY_VALUES)
        target = torch.empty_like(source)
        matrix = torch.randn(MATRIX, MATRIX)
        return Roof(
            threads=threads,
            read=source.nbytes / best_s(source.sum),
            copy=2 * source.nbytes / best_s(lambda: target.copy_(source)),
            product=2 * MATRIX**3 / best_s(lambda: matrix @ matrix),
        )
    finally:
        torch.set_num_threads(before)


def best_s(action: Callable[[], object]) -> float:
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < TRIAL_S:
        began_s = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def describe_machine() -> str:
    """Processor, what of its instruction sets matters here, load, and the commit that is measured."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        name = fields.get("model name", name)
        have = set(fields.get("flags", "").split())
        flags = f" ({' '.join(flag for flag in FLAGS if flag in have)})"
    except OSError:  # not Linux
        pass
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return (
        f"{os.cpu_count()} cores of {name}{flags}, load {', '.join(f'{load:.2f}' for load in os.getloadavg())};"
        f" torch {torch.__version__}, Python {platform.python_version()}, commit {commit.strip() or 'unknown'}"
    )
