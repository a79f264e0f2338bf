"""What a torch engine is told: the seam between the worker's settings and the engine."""

import dataclasses
from pathlib import Path
from typing import Literal, Self

from bus.settings import Settings

BLOCK_TOKENS = 32  # tokens of one KV block; four make a tile of the attention (attention.KV_TILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchEngineConfig:
    """`None` means: chosen at start from the model and the machine, and said in the log."""

    model_dir: Path  # Hugging Face directory: config.json, *.safetensors, tokenizer.json
    model_name: str = "smollm2-135m-instruct"
    capacity: int = 8  # sequences decoded at once
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Literal["auto", "compiled", "torch"] = "auto"  # of a CPU
    threads: int | None = None  # of a CPU
    kv_tokens: int | None = None  # tokens that the KV cache holds
    prefill_chunk: int = 512  # most prompt tokens of one step
    speculate: int = 0  # most tokens guessed at once of one answer (speculation.py); 0: none
    prefix_cache: bool = True
    warm_up: bool = True  # measure the rates with a few steps before the node registers

    def __post_init__(self) -> None:
        for name in ("capacity", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.speculate < 0:
            raise ValueError("speculate must be at least 0")
        if self.kv_tokens is not None and self.kv_tokens < BLOCK_TOKENS:
            raise ValueError(f"kv_tokens must be at least {BLOCK_TOKENS}")

    @classmethod
    def from_settings(cls, settings: Settings, model_dir: Path) -> Self:
        """model_dir: what `gpu_worker.model_files.resolve_model` answered for these settings."""
        return cls(
            model_dir=model_dir,
            model_name=settings.model,
            capacity=settings.capacity,
            dtype=settings.dtype,
            kernels=settings.kernels,
            threads=settings.threads,
            kv_tokens=settings.kv_tokens,
            prefill_chunk=settings.prefill_chunk,
            speculate=settings.speculate,
        )
