"""The model as peers can read it: our directory may keep the 4-bit and 8-bit groups of a GGUF file."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpu_worker.torch_engine.loader import weight_files
from gpu_worker.torch_engine.quantized import Quantized

DTYPE = torch.bfloat16
BITS = (4, 8)


def dense_copy(model: Path, folder: Path) -> Path:
    """`model` itself if nothing in it is quantised, else a copy below `folder` in bfloat16, made once."""
    copy = folder / f"dense-{model.resolve().name}"
    files = weight_files(model)
    newest = max(file.stat().st_mtime for file in files)
    done = copy / "model.safetensors"
    if done.exists() and done.stat().st_mtime >= newest:
        return copy
    stored = read_tensors(files)
    if not any(name.endswith(f".q{bits}") for name in stored for bits in BITS):
        return model
    copy.mkdir(parents=True, exist_ok=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, copy / file.name)
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": str(DTYPE).removeprefix("torch.")}))
    part = copy / "part"
    save_file(dequantise(stored), part, metadata={"format": "pt"})
    os.replace(part, done)
    return copy


def read_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in files:
        with safe_open(str(file), framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 - no mapping
    return tensors


def dequantise(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`w.q4`, `w.scale` and `w.min` become `w`; whatever else is there keeps its name."""
    dense = {}
    parts = set()
    for bits in BITS:
        for name in (key.removesuffix(f".q{bits}") for key in stored if key.endswith(f".q{bits}")):
            weight = Quantized(bits, stored[f"{name}.q{bits}"], stored[f"{name}.scale"], stored.get(f"{name}.min"))
            dense[name] = weight.dequantize(DTYPE)
            parts |= {f"{name}.q{bits}", f"{name}.scale", f"{name}.min"}
    return dense | {name: tensor.to(DTYPE) for name, tensor in stored.items() if name not in parts}
