# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Triton reads the annotations of its kernels and refuses Python types there.
"""The short operations of a layer as one Triton kernel each: fewer launches, and what lies between stays in registers.

Held to their plain forms in `ops.py`: at start (`fused_ops`), by tests on a GPU, and by tests on a CPU where Triton is
there to interpret them. Triton comes with torch on CUDA; it needs a C compiler once, so a bare machine may be without.
Arithmetic is float32, rounded once at the end.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.torch_engine.norm import RmsNorm
from gpu_worker.torch_engine.ops import PLAIN, Ops

SILU_BLOCK = 1024


def fused_ops(device: torch.device, dtype: torch.dtype) -> Ops | str:
    """The kernels if they do here what the plain forms do, else the reason. Compiles them: a second."""
    ops = Ops("triton", rotate_and_store, gated_silu, add_norm)
    try:
        wrong = [name for name, error in errors(ops, device, dtype).items() if not error < ERROR_MAX]
    except Exception as error:  # noqa: BLE001  # whatever somebody else's compiler raises where it cannot work
        return f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return f"wrong results of {', '.join(wrong)}" if wrong else ops


ERROR_MAX = 0.02  # relative, of bfloat16, where the plain forms round between their steps too


def errors(ops: Ops, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of each operation from its plain form, on odd sizes; infinite if it left no number."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
        parts = [((one.float() - two.float()) / (1 + two.float().abs())).abs() for one, two in pairs]
        return max(float(part.nan_to_num(nan=math.inf).max()) for part in parts)

    qkv, cos, sin = random(5, 12, 48), random(5, 48), random(5, 48)
    cos, sin = torch.cat([cos[:, :24]] * 2, -1), torch.cat([-sin[:, :24], sin[:, :24]], -1)
    slots = torch.tensor([7, 300, 0, 511, 64], device=device)
    caches = [torch.zeros(2, 2, 256, 2, 48, device=device, dtype=dtype) for _ in range(2)]
    projected = [qkv.clone() for _ in range(2)]
    for one, which, cache in zip(projected, (ops, PLAIN), caches, strict=True):
        which.rotate_and_store(one, cos, sin, slots, cache[0], cache[1])
    gate_up, delta, hidden = random(3, 2 * 1500), random(3, 600), random(3, 600)
    norm = RmsNorm(random(600), 1e-5)
    return {
        "rotate_and_store": difference([(caches[0], caches[1]), (projected[0][:, :8], projected[1][:, :8])]),
        "gated_silu": difference([(ops.gated_silu(gate_up), PLAIN.gated_silu(gate_up))]),
        "add_norm": difference(
            list(
                zip(ops.add_norm(delta.clone(), hidden, norm), PLAIN.add_norm(delta.clone(), hidden, norm), strict=True)
            )
        ),
    }


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """As `ops.rotate_and_store`, but key heads of qkv stay as they were: nobody reads them afterwards."""
    rows, heads, head_dim = qkv.shape
    kv_heads = keys.shape[2]
    half = head_dim // 2
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and keys.is_contiguous()
    rotate_and_store_kernel[(rows, heads)](
        qkv, cos, sin, slots, keys, values, heads, kv_heads, half, block=triton.next_power_of_2(half), num_warps=1
    )


def gated_silu(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    gated_silu_kernel[(rows, triton.cdiv(width, SILU_BLOCK))](gate_up, result, width, block=SILU_BLOCK, num_warps=4)
    return result


def add_norm(delta: Tensor, hidden: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    rows, width = delta.shape
    normed = torch.empty_like(delta)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(rows,)](
        delta, hidden, norm.weight, normed, width, norm.eps, block=block, num_warps=min(16, max(1, block // 512))
    )
    return delta, normed


@triton.jit
def rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    slots,
    keys,
    values,
    heads,
    kv_heads,
    half,
    block: tl.constexpr,
):
    """One head of one row: both halves of it."""
    row, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < half
    place = qkv + (row.to(tl.int64) * heads + head) * 2 * half + at
    first = tl.load(place, mask=inside)
    second = tl.load(place + half, mask=inside)
    query_heads = heads - 2 * kv_heads
    if head < heads - kv_heads:
        angle = row * 2 * half + at
        first_half, second_half = first.to(tl.float32), second.to(tl.float32)
        cos_first = tl.load(cos + angle, mask=inside).to(tl.float32)
        sin_first = tl.load(sin + angle, mask=inside).to(tl.float32)
        cos_second = tl.load(cos + angle + half, mask=inside).to(tl.float32)
        sin_second = tl.load(sin + angle + half, mask=inside).to(tl.float32)
        first = (first_half * cos_first + second_half * sin_first).to(first.dtype)
        second = (second_half * cos_second + first_half * sin_second).to(second.dtype)
    if head < query_heads:
        tl.store(place, first, mask=inside)
        tl.store(place + half, second, mask=inside)
    else:
        slot = tl.load(slots + row)
        own = (head - query_heads) % kv_heads
        offset = (slot * kv_heads + own) * 2 * half + at
        if head < heads - kv_heads:
            tl.store(keys + offset, first, mask=inside)
            tl.store(keys + offset + half, second, mask=inside)
        else:
            tl.store(values + offset, first, mask=inside)
            tl.store(values + offset + half, second, mask=inside)


@triton.jit
def gated_silu_kernel(gate_up, result, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(result + row * width + at, gated.to(result.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(delta, hidden, weight, normed, width, eps, block: tl.constexpr):
    """One row: its sum, in place of delta, and the RMS norm of that as it was rounded."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    added = tl.load(delta + row * width + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(hidden + row * width + at, mask=inside, other=0.0).to(tl.float32)
    added = added.to(delta.dtype.element_ty)
    tl.store(delta + row * width + at, added, mask=inside)
    x = added.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    result = x * scale * tl.load(weight + at, mask=inside).to(tl.float32)
    tl.store(normed + row * width + at, result.to(normed.dtype.element_ty), mask=inside)
