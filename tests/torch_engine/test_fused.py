"""Triton's kernels are the plain operations: on a GPU compiled, on a CPU interpreted where Triton is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

CHECK = """
import torch
from gpu_worker.torch_engine.cuda import fused
from gpu_worker.torch_engine.ops import Ops
ops = Ops("triton", fused.rotate_and_store, fused.gated_silu, fused.add_norm)
for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, fused.ERROR_MAX)):
    for name, error in fused.errors(ops, torch.device("cpu"), dtype).items():
        assert error < most, (name, dtype, error)
def left_out(delta, hidden, norm):
    return delta, hidden * torch.nan
broken = Ops("broken", fused.rotate_and_store, fused.gated_silu, left_out)
assert fused.errors(broken, torch.device("cpu"), torch.float32)["add_norm"] == float("inf")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: torch without CUDA")
def test_interpreted_kernels_give_what_the_plain_operations_give() -> None:
    """In a process of its own: Triton reads when it is imported whether to interpret."""
    subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_kernels_give_what_the_plain_operations_give(dtype: torch.dtype) -> None:
    fused = importlib.import_module("gpu_worker.torch_engine.cuda.fused")

    assert not isinstance(fused.fused_ops(torch.device("cuda"), dtype), str)
