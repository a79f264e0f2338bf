"""Which form of the model runs on this machine: chosen once at start, by what is there and probed."""

import dataclasses
import logging
from collections.abc import Callable
from typing import cast

import torch

from gpu_worker.torch_engine.cuda.graphs import GraphDecoder, cuda_capture
from gpu_worker.torch_engine.cuda.paged import PagedAttention, Probed, VarlenAttention, probe
from gpu_worker.torch_engine.model import Decoder, Model, ModelWeights
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.ops import PLAIN
from gpu_worker.torch_engine.tiles import TileAttention

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Backend:
    block_tokens: int
    depth: int  # steps in flight while the next is launched
    build: Callable[[ModelWeights, int, int], Model]  # from weights, blocks, context


def choose_backend(
    shape: ModelConfig, *, capacity: int, exact: bool, device: torch.device, dtype: torch.dtype
) -> Backend:
    """capacity: decode rows of one step, at most. exact: rows must come out in the same bits in any batch."""
    if device.type == "cuda":
        found = probe_paged(shape, device, dtype)
        if isinstance(found, Probed):
            return paged_backend(shape, found, capacity=capacity, device=device, dtype=dtype)
        log.warning("paged attention cannot be used, the slower tiles are", extra={"reason": found})
    return tile_backend(shape, exact=exact, device=device, dtype=dtype)


def probe_paged(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> Probed | str:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention has no kernel for {dtype}"
    return probe(flash_varlen(), shape, device, dtype)


def flash_varlen() -> VarlenAttention:
    """torch's own, without the line that it logs at each call."""
    from torch.nn.attention.varlen import varlen_attn  # here: it imports the compiler, seconds that a CPU need not wait

    logging.getLogger(varlen_attn.__module__).setLevel(logging.WARNING)
    return cast(VarlenAttention, varlen_attn)


def tile_backend(shape: ModelConfig, *, exact: bool, device: torch.device, dtype: torch.dtype) -> Backend:
    def build(weights: ModelWeights, blocks: int, context: int) -> Model:
        layers = range(len(weights.layers))
        attention = TileAttention(shape, layers, blocks, context=context, exact=exact, device=device, dtype=dtype)
        return Decoder(shape, weights, attention, dtype=dtype)

    return Backend(TileAttention.block_tokens, 0, build)


def paged_backend(
    shape: ModelConfig, probed: Probed, *, capacity: int, device: torch.device, dtype: torch.dtype
) -> Backend:
    def build(weights: ModelWeights, blocks: int, context: int) -> Model:
        attention = PagedAttention(
            shape,
            range(len(weights.layers)),
            blocks,
            context=context,
            varlen=flash_varlen(),
            decode_splits=probed.decode_splits,
            ops=PLAIN,
            device=device,
            dtype=dtype,
        )
        decoder = Decoder(shape, weights, attention, dtype=dtype)
        return GraphDecoder(decoder, attention, capacity=capacity, context=context, capture=cuda_capture())

    return Backend(PagedAttention.block_tokens, 1, build)
