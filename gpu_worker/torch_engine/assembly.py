"""Put an engine together: device, threads, dtype, weights, cache, core; and measure it before it takes work."""

import dataclasses
import gc
import logging
import os
import time
from pathlib import Path

import torch

from bus.ids import ModelName
from bus.jobs import ChatJob, Sampling
from gpu_worker.engine import End, EngineStartError, GenerateRequest
from gpu_worker.torch_engine import cgroups
from gpu_worker.torch_engine.backends import choose_backend
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.core import EngineCore, context_max
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.loader import load_weights, log_progress, resume_digest
from gpu_worker.torch_engine.model import Model
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from gpu_worker.torch_engine.prompt import prepare
from gpu_worker.torch_engine.rates import STALL, Rates
from gpu_worker.torch_engine.runner import Runner
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.text_model import TextModel, read_json

log = logging.getLogger(__name__)

KV_BYTES_SHARE = {"cpu": 0.25, "cuda": 0.8}  # of the memory that is free at start, at most, when kv_tokens is not set
STALLS = {"cpu": STALL, "cuda": 1.0}  # where steps take milliseconds, prompts get on fast enough with less
SEQUENCE_TOKENS_TYPICAL = 1024
WARM_UP_PROMPTS = ("The quick brown fox jumps over the lazy dog. " * 6, "A millrace turns a stream into power. " * 8)
WARM_UP_LIMIT_S = 1.0  # a pass in progress ends after this, and the next one does not begin: a start must not wait
WARM_UP_TOKENS = 6


@dataclasses.dataclass(frozen=True)
class Assembled:
    core: EngineCore
    model: Model
    text: TextModel
    context: int  # tokens of one sequence at most
    layers: int
    digest: str
    threads: int  # of a step
    torch_threads: int  # of those, what torch's own operations use


def assemble(config: TorchEngineConfig) -> Assembled:
    """Load the model into a working core. Takes seconds; runs in a thread. Raises EngineStartError."""
    began_s = time.monotonic()
    device = choose_device(config.device)
    shape = parse_config(read_json(config.model_dir / "config.json"))
    dtype = choose_dtype(config.dtype, device)
    backend = choose_backend(shape, config, cores=usable_cores(), device=device, dtype=dtype)
    torch.set_num_threads(backend.torch_threads)
    progress = log_progress(config.model_name)
    weights = load_weights(config.model_dir, shape, range(shape.layers), backend.factory, progress)
    text = TextModel(config.model_dir)
    blocks = choose_blocks(config, shape, backend.block_tokens, device, dtype)
    context = context_max(shape.context, blocks * backend.block_tokens)
    model = backend.build(weights, blocks, context)
    core = EngineCore(
        Runner(model, device=device, depth=backend.depth),
        Scheduler(
            BlockPool(blocks, model.block_tokens, prefix_cache=config.prefix_cache),
            capacity=config.capacity,
            chunk_max=config.prefill_chunk,
        ),
        eos=text.eos,
        speculate=config.speculate,
        stall=STALLS[device.type],
    )
    assembled = Assembled(
        core,
        model,
        text,
        context,
        shape.layers,
        resume_digest(config.model_dir, text.digest()),
        backend.threads,
        backend.torch_threads,
    )
    if config.warm_up:
        warm_up(assembled)
    log.info(
        "torch engine ready",
        extra={
            "model": config.model_name,
            "seconds": round(time.monotonic() - began_s, 2),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": backend.threads,
            "linear": weights.layers[0].qkv.kind,
            "weight_mib": round(weights.bytes_read / 2**20),
            "attention": model.kind,
            "kv_tokens": blocks * model.block_tokens,
            "context": context,
            "prefill_rate": round(core.rates.prefill_rate),
            "decode_rate": round(core.rates.decode_rate([])),
        },
    )
    return assembled


def assemble_for_good(config: TorchEngineConfig) -> Assembled:
    """As `assemble`, in a process that is for this engine: what is loaded is never looked through for garbage again.

    It is a quarter of a million Python objects, most of torch and Numba, and each look at them stops every thread for
    more than 100 ms: running answers would stall every few thousand tokens.
    """
    assembled = assemble(config)
    gc.collect()
    gc.freeze()
    return assembled


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EngineStartError("device cuda was asked for, but torch sees no GPU")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def usable_cores(process: Path = cgroups.PROCESS) -> int:
    """That this process may run on, or have the time of, which in a container can be few of many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, cgroups.allowed_cores(process) or cores)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` goes by what is there, never by a measurement: equal machines must choose alike under any load.

    On a CPU that is float32: exact, and what the compiled kernels compute in. One with AMX may well be faster in
    bfloat16, above all with prompts, but then the way and the order of sums are the library's: to be asked for.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_blocks(
    config: TorchEngineConfig, shape: ModelConfig, block_tokens: int, device: torch.device, dtype: torch.dtype
) -> int:
    """kv_tokens if set. Else room for every slot's typical sequence or one of full length, within a share of memory."""
    if config.kv_tokens is not None:
        return max(1, config.kv_tokens // block_tokens)
    wanted = max(shape.context, config.capacity * SEQUENCE_TOKENS_TYPICAL)
    token_bytes = shape.kv_values_per_token * dtype.itemsize
    affordable = int(free_memory(device) * KV_BYTES_SHARE[device.type]) // token_bytes
    return max(1, min(wanted, affordable) // block_tokens)


def free_memory(device: torch.device, process: Path = cgroups.PROCESS) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine, container = machine_memory(), cgroups.free_bytes(process)
    return machine if container is None else min(machine, container)


def machine_memory() -> int:
    """Bytes that are free, whoever may have them."""
    try:
        return available_bytes(Path("/proc/meminfo").read_text(encoding="ascii"))
    except (OSError, ValueError):  # not Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system says
        return 4 << 30


def available_bytes(meminfo: str) -> int:
    """What can be had without swapping, files in the page cache included. Raises ValueError."""
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ValueError("no MemAvailable")


def warm_up(assembled: Assembled) -> None:
    """A few steps through the whole path, twice if time permits: the first pass makes what is made once."""
    limit_s = time.monotonic() + WARM_UP_LIMIT_S
    core = assembled.core
    for text in WARM_UP_PROMPTS:
        job = ChatJob(
            model=ModelName("warm-up"),
            prompt=text,
            max_tokens=WARM_UP_TOKENS,
            sampling=Sampling(temperature=0.0),
            ignore_eos=True,
        )
        answer = prepare(GenerateRequest("warm-up", job, seed=0), assembled.text, context_max=assembled.context)
        if isinstance(answer, End):
            return  # a context too small for the text: the first real steps measure
        core.rates = Rates(core.rates.stall)
        core.add(answer)
        steps = 0
        while not core.idle:
            if time.monotonic() > limit_s and steps >= 2:  # one prefill and one decode step are the least
                core.cancel("warm-up")
            else:
                core.step()
            steps += 1
        core.rates.sequence_tokens = Rates().sequence_tokens
        if time.monotonic() > limit_s:
            return
