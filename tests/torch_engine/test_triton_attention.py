"""Triton's attention is the plain one: on a GPU compiled, on a CPU interpreted where Triton is installed."""

import importlib.metadata
import importlib.util
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from gpu_worker.torch_engine.backends import triton_varlen
from gpu_worker.torch_engine.batch import Piece
from gpu_worker.torch_engine.cuda.paged import BLOCK_TOKENS, Probed, host_calls, run_call
from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK
from tests.torch_engine.varlen import reference_varlen

HEADS = [(1, 2, 64), (3, 3, 64), (4, 2, 128), (5, 1, 96), (7, 1, 80), (8, 1, 128), (20, 1, 16)]  # group, kv_heads, dim
PADDING = (1, 1)  # a row of a graph that nobody uses
FEW = [(1, 3), (1, 257), PADDING, (1, 150), (40, 130), (1, 1), (2, 65)]  # rows, keys
PIECES = {
    "few": FEW,
    "long": [(1, 1999), PADDING, (1, 64), (33, 2000), (700, 700)],
    "many": [(1, 70 + n % 9) for n in range(260)],  # so many that their keys are not split
}
CHECK = """
import torch
from gpu_worker.torch_engine.cuda import triton_attention
from tests.torch_engine.test_triton_attention import FEW, difference
for heads in ((3, 2, 64), (1, 2, 80), (20, 1, 16)):
    error = difference(heads, FEW, torch.device("cpu"), torch.float32)
    assert error < 1e-5, (heads, error)
triton_attention.PROGRAMS = 1  # one split
error = difference((4, 1, 128), FEW, torch.device("cpu"), torch.float16)  # the interpreter multiplies no bfloat16
assert error < 0.003, error
"""


def difference(
    heads: tuple[int, int, int], wanted: list[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> float:
    """The largest of any row's result; infinite if one is no number. Blocks lie in any order."""
    group, kv_heads, head_dim = heads
    blocks = list(range(1, 1 + sum(-(-length // BLOCK_TOKENS) for _, length in wanted)))
    random.Random(len(wanted)).shuffle(blocks)
    generator = torch.Generator().manual_seed(group)
    pool = (2, len(blocks) + 1, BLOCK_TOKENS, kv_heads, head_dim)
    keys, values = torch.randn(pool, generator=generator).to(device, dtype)
    pieces: list[Piece] = []
    row = 0
    for count, length in wanted:
        own = [blocks.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        pieces.append(Piece(row, length - count, count, [NULL_BLOCK] if (count, length) == PADDING else own))
        row += count
    qkv = torch.randn(row, (group + 2) * kv_heads, head_dim, generator=generator).to(device, dtype)
    tried, plain = Probed("Triton", triton_varlen(), None), Probed("plain", reference_varlen, 1)
    worst = 0.0
    for call in host_calls(tuple(pieces)):
        queries, there = qkv[call.rows, : group * kv_heads], call.to(device)
        found = run_call(tried, queries, keys, values, there).float()
        expected = run_call(plain, queries.float(), keys.float(), values.float(), there)
        worst = max(worst, float((found - expected).abs().nan_to_num(nan=math.inf).max()))
    return worst


def why_not_interpreted() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: torch without CUDA"
    triton = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if triton < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton below 3.7 cannot count a loop's steps with NumPy from 2.4 on"
    return ""


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_the_interpreted_kernel_gives_what_the_plain_form_gives() -> None:
    """In a process of its own: Triton reads when it is imported whether to interpret."""
    subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pieces", PIECES)
def test_the_compiled_kernel_gives_what_the_plain_form_gives(heads: tuple[int, int, int], pieces: str) -> None:
    assert difference(heads, PIECES[pieces], torch.device("cuda"), torch.float16) < 0.01
    assert difference(heads, PIECES[pieces], torch.device("cuda"), torch.bfloat16) < 0.05
