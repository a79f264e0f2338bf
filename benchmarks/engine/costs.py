"""What a decode step has to read and to compute at least, for shares of what the machine can do. Pure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpu_worker.torch_engine.model_config import ModelConfig

MIB = 2.0**20
# By what a driver says of its storage. Of groups of 32: their 4-bit or 8-bit numbers, and float16 scale (and minimum).
BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "half": 2.0,
    "packed": 4.0,
    "plain": 4.0,
    "nibbles": 20 / 32,
    "bytes": 34 / 32,
}


@dataclasses.dataclass(frozen=True)
class StepCost:
    bytes_read: float  # weights once, and every request's keys and values
    operations: float  # multiplications and additions


def step_cost(shape: ModelConfig, *, requests: int, tokens: float, weight_bytes: float, kv_itemsize: int) -> StepCost:
    """tokens: of a sequence, in the middle of its answer."""
    keys_and_values = requests * tokens * shape.kv_values_per_token * kv_itemsize
    attention = 4 * tokens * shape.layers * shape.heads * shape.head_dim  # scores, and the sum of values by them
    return StepCost(weight_bytes + keys_and_values, requests * (2 * matrix_values(shape) + attention))


def matrix_values(shape: ModelConfig) -> int:
    """Weights in matrices that a decode step multiplies by, head included."""
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim  # query and output; keys and values
    return shape.hidden * (shape.layers * (heads + 3 * shape.intermediate) + shape.vocabulary)


def weight_bytes(ready: Mapping[str, Any], shape: ModelConfig, file_bytes: int | None) -> float | None:
    """Of a contender, by what its driver said about itself. file_bytes: of the file that it computes from, if it does.

    None where nothing is known.
    """
    if file_bytes is not None:
        return float(file_bytes)
    if ready.get("weight_mib"):
        return float(ready["weight_mib"]) * MIB
    each = BYTES_PER_WEIGHT.get(ready.get("weight_kind", ready.get("storage", "")))
    return None if each is None else matrix_values(shape) * each
