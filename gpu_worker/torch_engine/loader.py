"""From a Hugging Face directory to weights in the engine's form. Strict: each tensor is used once and has its shape."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpu_worker.engine import EngineStartError
from gpu_worker.torch_engine.model import HeldMatrix, LayerWeights, Matrix, ModelWeights
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.norm import RmsNorm
from gpu_worker.torch_engine.quantized import GROUP, Quantized, Weight
from gpu_worker.torch_engine.stored import is_finite, same, smallest_dtype

log = logging.getLogger(__name__)

AnyWeight = TypeVar("AnyWeight", Tensor, Quantized)
Read = TypeVar("Read")
Made = TypeVar("Made", bound=HeldMatrix, covariant=True)
Progress = Callable[[float], None]  # 0..1
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
HALVES = {torch.float16}
SAMPLE_BYTES = 4096
SAMPLES = 256
MAPPED_BYTES_MAX = (
    64 << 20
)  # read of files before they are mapped anew: mapped pages that were read count as our memory


class MatrixFactory(Protocol[Made]):
    """Makes what a backend multiplies with. Norms and biases come to it in its dtype on its device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def build(self, *parts: Weight, bias: Tensor | None = None, gated: bool = False) -> Made:
        """parts: (out, in) each, one below the other, on the device, as they are stored: on a CPU perhaps views of a
        file, of which nothing may be kept. bias: (out,) of all. gated: two alike, gates and what they are for.
        """


class Shard:
    """One file. Its tensors are views of a mapping, which lasts until the shard and all of them have let it go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped: Any = None

    def names(self) -> list[str]:
        return self._read(lambda mapped: list(mapped.keys()))

    def get(self, name: str) -> Tensor:
        return self._read(lambda mapped: cast(Tensor, mapped.get_tensor(name)))

    def let_go(self) -> None:
        """The next `get` maps the file anew."""
        self._mapped = None

    def _read(self, what: Callable[[Any], Read]) -> Read:
        try:
            if self._mapped is None:
                self._mapped = safe_open(str(self._path), framework="pt")
            return what(self._mapped)
        except (SafetensorError, OSError) as error:
            raise EngineStartError(
                f"{self._path}: cannot be read: {error}; remove it and fetch the model again"
            ) from error


class TensorSource:
    """The tensors of all shards, by name; remembers which were taken."""

    def __init__(self, directory: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._where: dict[str, Shard] = {}
        self._shards = [Shard(path) for path in weight_files(directory)]
        self._mapped_bytes = 0
        for shard in self._shards:
            for name in shard.names():
                if name in self._where:
                    raise EngineStartError(f"{directory}: tensor {name} is in two files")
                self._where[name] = shard
        self._untaken = set(self._where)

    def has(self, name: str) -> bool:
        return name in self._where or any(f"{name}.q{bits}" in self._where for bits in (4, 8))

    def take(self, name: str, *shape: int) -> Tensor:
        """In the engine's dtype on its device. Raises EngineStartError if missing, of another shape or not finite."""
        # A copy even if nothing changes: a view would keep the whole file mapped.
        tensor = self._stored(name, shape, FLOATS).to(self._device, self._dtype, copy=True)
        return _checked(name, tensor)

    def take_matrix(self, name: str, out: int, width: int) -> Weight:
        """As it is stored, on the device: on a CPU a view of the file. The parts of a quantised one have own names."""
        bits = next((bits for bits in (4, 8) if f"{name}.q{bits}" in self._where), None)
        if bits is None:
            return _checked(name, self._stored(name, (out, width), FLOATS).to(self._device))
        groups = (out, width // GROUP)
        values, kinds = ((out, width // 2), {torch.uint8}) if bits == 4 else ((out, width), {torch.int8})
        weight = Quantized(
            bits,
            self._stored(f"{name}.q{bits}", values, kinds),
            self._stored(f"{name}.scale", groups, HALVES),
            self._stored(f"{name}.min", groups, HALVES) if bits == 4 else None,
        )
        return _checked(name, weight.to(self._device))

    def check_all_taken(self, *, ignore: Callable[[str], bool]) -> None:
        left = sorted(name for name in self._untaken if not ignore(name))
        if left:
            raise EngineStartError(
                f"the model has {len(left)} tensors that this architecture does not know, such as {left[0]}"
            )

    def _stored(self, name: str, shape: tuple[int, ...], dtypes: Container[torch.dtype]) -> Tensor:
        if name not in self._where:
            raise EngineStartError(f"the model lacks tensor {name}")
        tensor = self._where[name].get(name)
        self._mapped_bytes += tensor.nbytes
        if self._mapped_bytes > MAPPED_BYTES_MAX:
            self._mapped_bytes = 0
            for shard in self._shards:
                shard.let_go()
        if tuple(tensor.shape) != shape:
            raise EngineStartError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in dtypes:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise EngineStartError(f"tensor {name} is stored as {kind}, which is not supported here")
        self._untaken.discard(name)
        return tensor


def _checked(name: str, weight: AnyWeight) -> AnyWeight:
    if not is_finite(weight):
        raise EngineStartError(f"tensor {name} holds values that are not finite: the file is damaged")
    return weight


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, which other forms of the same weights, and the index of an earlier save, may lie beside; else
    what an index names; else all. The order of transformers.

    Raises EngineStartError if there are none.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise EngineStartError(f"{index}: cannot be read as an index of weights: {error}") from error
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise EngineStartError(
            f"{directory}: no *.safetensors; run `make run`, or set MILLRACE_MODEL_PATH to a model directory"
        )
    return files


def load_weights(
    directory: Path, config: ModelConfig, layers: range, factory: MatrixFactory[Matrix], progress: Progress
) -> ModelWeights[Matrix]:
    """The weights of a contiguous range of layers, with embeddings at its first end and norm and head at its last."""
    first, last = layers.start == 0, layers.stop == config.layers
    source = TensorSource(directory, device=factory.device, dtype=factory.dtype)
    embedding = keep_rows(_embedding(source, config), factory.dtype) if first else None
    loaded = []
    for index in layers:
        loaded.append(_load_layer(source, config, index, factory))
        progress(len(loaded) / (len(layers) + 1))
    norm = RmsNorm(source.take("model.norm.weight", config.hidden), config.norm_eps) if last else None
    head = factory.build(_head(source, config, embedding, factory.dtype)) if last else None
    source.check_all_taken(ignore=lambda name: _belongs_elsewhere(name, config, layers))
    progress(1.0)
    return ModelWeights(tuple(loaded), embedding, norm, head)


def _embedding(source: TensorSource, config: ModelConfig) -> Weight:
    """A tied one may be stored under the name of the head alone: `save_model` keeps one name of what is shared."""
    name = HEAD if config.tied_head and not source.has(EMBEDDING) and source.has(HEAD) else EMBEDDING
    return source.take_matrix(name, config.vocabulary, config.hidden)


def _head(source: TensorSource, config: ModelConfig, embedding: Weight | None, dtype: torch.dtype) -> Weight:
    """A tied head may be stored a second time; if that one differs, the config is wrong about one of them."""
    if not config.tied_head:
        return source.take_matrix(HEAD, config.vocabulary, config.hidden)
    tied = _embedding(source, config) if embedding is None else embedding
    if source.has(HEAD) and source.has(EMBEDDING):
        own = source.take_matrix(HEAD, config.vocabulary, config.hidden)
        if not same(own, tied, dtype):
            raise EngineStartError(f"{HEAD} differs from the embedding, which config.json says it is tied to")
    return tied


def keep_rows(embedding: Weight, dtype: torch.dtype) -> Weight:
    """What an embedding is kept as, for its rows are only looked up: beside float32 in the smallest form that is exact.

    dtype: of the engine. Never a view of a file.
    """
    if isinstance(embedding, Quantized):
        return embedding.clone()
    kept = smallest_dtype([embedding]) if dtype == torch.float32 else dtype
    return embedding.to(kept, copy=True)


def _load_layer(
    source: TensorSource, config: ModelConfig, index: int, factory: MatrixFactory[Matrix]
) -> LayerWeights[Matrix]:
    prefix = f"model.layers.{index}."
    hidden, middle = config.hidden, config.intermediate
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def fused(names: list[str], outs: list[int], width: int, biased: bool, gated: bool = False) -> Matrix:
        sizes = list(zip(names, outs, strict=True))
        parts = [source.take_matrix(f"{prefix}{name}.weight", out, width) for name, out in sizes]
        bias = torch.cat([source.take(f"{prefix}{name}.bias", out) for name, out in sizes]) if biased else None
        return factory.build(*parts, bias=bias, gated=gated)

    def norm(name: str, width: int) -> RmsNorm:
        return RmsNorm(source.take(f"{prefix}{name}.weight", width), config.norm_eps)

    def head_norm(name: str) -> RmsNorm | None:
        return norm(f"self_attn.{name}", config.head_dim) if config.qk_norm else None

    return LayerWeights(
        attention_norm=norm("input_layernorm", hidden),
        qkv=fused([f"self_attn.{name}_proj" for name in "qkv"], [queries, keys, keys], hidden, config.qkv_bias),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
        output=fused(["self_attn.o_proj"], [hidden], queries, config.output_bias),
        mlp_norm=norm("post_attention_layernorm", hidden),
        gate_up=fused(["mlp.gate_proj", "mlp.up_proj"], [middle, middle], hidden, config.mlp_bias, gated=True),
        down=fused(["mlp.down_proj"], [hidden], middle, config.mlp_bias),
    )


def _belongs_elsewhere(name: str, config: ModelConfig, layers: range) -> bool:
    """Other ranges' tensors, and tables that older exports carry and everybody computes."""
    parts = name.split(".")
    if parts[-2:-1] == ["rotary_emb"] and parts[-1] in ("inv_freq", "cos_cached", "sin_cached"):
        return True
    if parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) < config.layers:
        return int(parts[2]) not in layers
    outer = (HEAD, EMBEDDING, "model.norm.weight")
    return name.startswith(outer) and len(layers) < config.layers


def resume_digest(directory: Path, text_digest: bytes) -> str:
    """Equal for engines that may exchange token ids: the same text side (`TextModel.digest`) and the same weights.

    Of each weight file: size, and samples spread over it (its header is among them), so that large models start soon.
    """
    digest = hashlib.sha256(text_digest)
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def log_progress(name: str, clock: Callable[[], float] = time.monotonic, every_s: float = 1.0) -> Progress:
    """Says how far loading is, at most once every `every_s` seconds."""
    next_s = clock() + every_s

    def progress(fraction: float) -> None:
        nonlocal next_s
        if clock() >= next_s and fraction < 1.0:
            next_s = clock() + every_s
            log.info("loading weights", extra={"model": name, "percent": round(100 * fraction)})

    return progress
