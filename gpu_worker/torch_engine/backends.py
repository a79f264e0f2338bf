"""Which form of the model runs on this machine: chosen once at start, by what is there and probed."""

import contextlib
import dataclasses
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, cast

import torch

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.cuda.graphs import GraphDecoder, cuda_capture
from gpu_worker.torch_engine.cuda.paged import PagedAttention, Probed, VarlenAttention, probe
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder, supports
from gpu_worker.torch_engine.kernels.packing import PackedFactory
from gpu_worker.torch_engine.kernels.ready import compile_now, has_instructions, host_features
from gpu_worker.torch_engine.kernels.weights import PackedWeight
from gpu_worker.torch_engine.linear import Linear, LinearFactory
from gpu_worker.torch_engine.loader import MatrixFactory
from gpu_worker.torch_engine.model import Decoder, Matrix, Model, ModelWeights
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.ops import PLAIN, Ops
from gpu_worker.torch_engine.tiles import TileAttention

log = logging.getLogger(__name__)

THREADS_PER_CORE_MAX = 4  # more than one only share its time; thousands take the start a minute, or cannot be made


@dataclasses.dataclass(frozen=True)
class Backend(Generic[Matrix]):
    block_tokens: int
    depth: int  # steps in flight while the next is launched
    threads: int  # that compute a step
    torch_threads: int  # of those, what torch's own operations use
    factory: MatrixFactory[Matrix]
    build: Callable[[ModelWeights[Matrix], int, int], Model]  # from weights, blocks, context


def choose_backend(
    shape: ModelConfig, config: TorchEngineConfig, *, cores: int, device: torch.device, dtype: torch.dtype
) -> Backend[Any]:
    """cores: that this process may use. Raises EngineStartError if kernels were asked for that cannot be used, or
    threads without end."""
    if config.threads is not None and config.threads > THREADS_PER_CORE_MAX * cores:
        raise EngineStartError(
            f"MILLRACE_THREADS={config.threads} is more than {THREADS_PER_CORE_MAX} a core, and this process may use"
            f" {cores}: set it to {cores} at most, or leave it empty"
        )
    threads = config.threads or torch_threads(cores)
    if device.type == "cuda":
        found = probe_paged(shape, device, dtype)
        if isinstance(found, Probed):
            return paged_backend(shape, found, config.capacity, threads=threads, device=device, dtype=dtype)
        log.warning("paged attention cannot be used, the slower tiles are", extra={"reason": found})
    elif config.kernels != "torch":
        reason = why_not_compiled(shape, dtype) or why_not_compiling()
        if reason is None:
            return compiled_backend(shape, threads=config.threads or kernel_threads(cores))
        if config.kernels == "compiled":
            raise EngineStartError(f"MILLRACE_KERNELS=compiled cannot be had here: {reason}")
        log.warning("compiled kernels cannot be used, torch's slower operations are", extra={"reason": reason})
    return tile_backend(shape, threads=threads, device=device, dtype=dtype)


def torch_threads(cores: int) -> int:
    """One core is left to the event loop and the system, two on large machines.

    A step is hundreds of short parallel sections, each as slow as its slowest thread: one thread that has to share its
    core with a busy neighbour makes the whole step several times slower (measured), so room pays more than it costs.
    """
    return max(1, cores - 1) if cores <= 8 else cores - 2


def kernel_threads(cores: int) -> int:
    """Of the compiled kernels: a thread whose core has other work too finds less to do, and holds nobody up."""
    return cores if cores <= 4 else cores - 1


def why_not_compiled(shape: ModelConfig, dtype: torch.dtype) -> str | None:
    """None: the compiled kernels can be used."""
    if dtype != torch.float32:
        return f"they compute in float32, and {str(dtype).removeprefix('torch.')} was chosen"
    if not has_instructions(platform.machine(), host_features()):
        return "this CPU lacks fused multiply-add or float16 conversion"
    return None if supports(shape) else "the model's widths are no multiples of 32"


def why_not_compiling() -> str | None:
    """Compiles, before any weight is read. None: it worked."""
    try:
        compile_now(log.info)
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way; a model runs without it
        return f"they cannot be compiled: {error!r}"
    return None


def compiled_backend(shape: ModelConfig, *, threads: int) -> Backend[Any]:
    def build(weights: ModelWeights[PackedWeight], blocks: int, context: int) -> Model:
        with kv_memory(shape, blocks * CompiledDecoder.block_tokens, torch.float32):
            return CompiledDecoder(shape, weights, blocks=blocks, context=context, threads=threads)

    # What is left to torch is small: threads of its own would only wait for each other, and for the kernels'.
    return Backend(CompiledDecoder.block_tokens, 0, threads, 1, PackedFactory(), build)


@contextlib.contextmanager
def kv_memory(shape: ModelConfig, tokens: int, dtype: torch.dtype) -> Iterator[None]:
    """Around whatever takes memory for so many tokens, and for what lies beside them. Raises EngineStartError."""
    size = tokens * shape.kv_values_per_token * dtype.itemsize
    try:
        if size > sys.maxsize:  # allocators say this each in its own way
            raise MemoryError("no address is that large")
        yield
    except (MemoryError, OSError, torch.OutOfMemoryError) as error:
        raise EngineStartError(
            f"no memory for the keys and values of {tokens} tokens, {size / 2**30:.1f} GiB"
            f" ({str(error).splitlines()[0]}): set MILLRACE_KV_TOKENS lower"
        ) from error


def flash_varlen() -> VarlenAttention:
    """torch's own, without the line that it logs at each call."""
    module = import_module(
        "torch.nn.attention.varlen"
    )  # here: it loads torch's compiler, seconds that a CPU need not wait
    logging.getLogger(module.__name__).setLevel(logging.WARNING)
    return cast(VarlenAttention, module.varlen_attn)


def triton_varlen() -> VarlenAttention:
    module = import_module("gpu_worker.torch_engine.cuda.triton_attention")  # here: a torch without CUDA has no Triton
    return cast(VarlenAttention, module.triton_varlen)


PAGED_KERNELS: dict[str, Callable[[], VarlenAttention]] = {"FlashAttention": flash_varlen, "Triton": triton_varlen}


def probe_paged(
    shape: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Mapping[str, Callable[[], VarlenAttention]] = PAGED_KERNELS,
) -> Probed | str:
    """The first of these kernels that is right here, or why none of them is."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel of it computes in {dtype}"
    reasons: list[str] = []
    for name, load in kernels.items():
        try:
            found = probe(name, load(), shape, device, dtype)
        except ImportError as error:
            found = str(error)
        if isinstance(found, Probed):
            if reasons:
                log.warning(
                    "paged attention uses a slower kernel", extra={"kernel": name, "reason": "; ".join(reasons)}
                )
            return found
        reasons.append(f"{name}: {found}")
    return "; ".join(reasons)


def choose_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """Triton's kernels where they compile and are right."""
    try:
        fused = import_module("gpu_worker.torch_engine.cuda.fused")  # here: a torch without CUDA has no Triton
        found: Ops | str = fused.fused_ops(device, dtype)
    except ImportError as error:
        found = str(error)
    if isinstance(found, Ops):
        return found
    log.warning("Triton cannot be used, operations are not fused", extra={"reason": found})
    return PLAIN


def tile_backend(shape: ModelConfig, *, threads: int, device: torch.device, dtype: torch.dtype) -> Backend[Linear]:
    factory = LinearFactory(device=device, dtype=dtype)

    def build(weights: ModelWeights[Linear], blocks: int, context: int) -> Model:
        layers = range(len(weights.layers))
        with kv_memory(shape, blocks * TileAttention.block_tokens, dtype):
            attention = TileAttention(
                shape, layers, blocks, context=context, exact=factory.exact, device=device, dtype=dtype
            )
        return Decoder(shape, weights, attention, dtype=dtype)

    return Backend(TileAttention.block_tokens, 0, threads, threads, factory, build)


def paged_backend(
    shape: ModelConfig, probed: Probed, capacity: int, *, threads: int, device: torch.device, dtype: torch.dtype
) -> Backend[Linear]:
    ops = choose_ops(device, dtype)

    def build(weights: ModelWeights[Linear], blocks: int, context: int) -> Model:
        with kv_memory(shape, blocks * PagedAttention.block_tokens, dtype):
            attention = PagedAttention(
                shape,
                range(len(weights.layers)),
                blocks,
                context=context,
                kernel=probed,
                ops=ops,
                device=device,
                dtype=dtype,
            )
            decoder = Decoder(shape, weights, attention, dtype=dtype, ops=ops)
            return GraphDecoder(decoder, attention, capacity=capacity, context=context, capture=cuda_capture())

    return Backend(PagedAttention.block_tokens, 1, threads, threads, LinearFactory(device=device, dtype=dtype), build)
