"""The torch engine on a GPU: shares of the memory's roof, many at once beside transformers, time between tokens.

    python -m benchmarks.engine_cuda                        Llama-shaped 8B with random weights, and the default model
    python -m benchmarks.engine_cuda --models default --concurrent 64 --seconds 20

Without a GPU it says so and ends. The roof is the rate of a copy on this GPU in this run, bytes read and written. The
peer is transformers' continuous batching in the venv that `python -m benchmarks.engine` makes, on the same GPU, with
the same shape, dtype, prompts and lengths, after our engine has given its memory back.
"""

import argparse
import dataclasses
import gc
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.engine.contenders import BENCH_FOLDER, PEERS_FOLDER, TRANSFORMERS
from benchmarks.engine.costs import matrix_values, step_cost
from benchmarks.engine.figures import Arrivals, decode_rate, percentile, token_times
from benchmarks.engine.process import Driver, DriverFailed
from gpu_worker.torch_engine.backends import choose_backend
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.core import EngineCore
from gpu_worker.torch_engine.detokenizer import TextStream
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.loader import MatrixFactory, load_weights
from gpu_worker.torch_engine.model import LayerWeights, ModelWeights
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config
from gpu_worker.torch_engine.norm import RmsNorm
from gpu_worker.torch_engine.prompt import Answer
from gpu_worker.torch_engine.runner import Runner
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import SamplingChoice
from gpu_worker.torch_engine.sequence import Sequence as Generation

EIGHT_BILLION: dict[str, Any] = {  # the shape of Llama 3.1 8B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
PROMPT, NEW = 128, 256
LONG_PROMPT, LONG_EVERY_S = 2000, 0.5
RUNNING = 16  # answers that run while long prompts arrive
COPY_BYTES = 4 << 30
PEER_LIMIT_S = 1800.0


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model's engine. A token's time is when the host has it."""

    core: EngineCore
    shape: ModelConfig
    kind: str
    weight_bytes: int


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU")
        return
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda")
    roof = copy_rate(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {roof / 1e12:.2f} TB/s")
    for name, folder in folders(options).items():
        config = TorchEngineConfig(model_dir=folder, capacity=options.concurrent)
        bench = build(config, device=device, dtype=torch.bfloat16)
        print(f"\n{name}: {bench.weight_bytes / 2**30:.1f} GiB of weights, attention {bench.kind}", flush=True)
        for line in own_lines(bench, roof, options):
            print(line, flush=True)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
        print(peer_line(folder, options), flush=True)


def own_lines(bench: Bench, roof: float, options: argparse.Namespace) -> Iterator[str]:
    chance = random.Random(options.seed)
    burst(bench, 2, 16, chance)  # what is set up once
    for count in (1, options.concurrent):
        rate = decode_rate(token_times(burst(bench, count, options.new, chance)))
        if rate is None:
            yield f"{count} at once: never all at the same time"
            continue
        cost = step_cost(
            bench.shape, requests=count, tokens=PROMPT + options.new / 2, weight_bytes=bench.weight_bytes, kv_itemsize=2
        )
        share = cost.bytes_read * rate / count / roof
        yield f"{count} at once: {rate:.0f} tokens/s, {share:.0%} of the roof of {roof * count / cost.bytes_read:.0f}"
    gaps, prompts = gaps_beside_prompts(bench, options.seconds, chance)
    p50, p99 = percentile(gaps, 0.5), percentile(gaps, 0.99)
    yield (
        f"{RUNNING} answers while {prompts} prompts of {LONG_PROMPT} arrive: "
        f"between tokens p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.1f}x)"
    )


def burst(bench: Bench, count: int, new: int, chance: random.Random) -> Arrivals:
    """All at once, step by step, with the time of every token."""
    came: dict[str, list[tuple[float, int]]] = {str(n): [] for n in range(count)}
    began_s = time.perf_counter()
    for name in came:
        bench.core.add(answer(bench.shape, name, PROMPT, new, chance))
    while not bench.core.idle:
        for piece in bench.core.step().pieces:
            came[piece.sequence].append((time.perf_counter() - began_s, len(piece.tokens)))
    return list(came.values())


def gaps_beside_prompts(bench: Bench, seconds: float, chance: random.Random) -> tuple[list[float], int]:
    """Milliseconds between tokens of RUNNING answers, all the time that long prompts arrive, and how many did."""
    core, context = bench.core, bench.shape.context
    for n in range(RUNNING):
        core.add(answer(bench.shape, f"answer {n}", PROMPT, context - PROMPT, chance))
    last_s: dict[str, float] = {}
    while len(last_s) < RUNNING:
        gaps_of_step(core, last_s)
    gaps: list[float] = []
    prompts, began_s = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - began_s) < seconds and len(core.scheduler.running) >= RUNNING:
        if passed_s >= prompts * LONG_EVERY_S:
            core.add(answer(bench.shape, f"prompt {prompts}", LONG_PROMPT, 1, chance))
            prompts += 1
        gaps += gaps_of_step(core, last_s)
    for name in [f"answer {n}" for n in range(RUNNING)] + [f"prompt {n}" for n in range(prompts)]:
        core.cancel(name)
    while not core.idle:
        core.step()
    return gaps, prompts


def gaps_of_step(core: EngineCore, last_s: dict[str, float]) -> list[float]:
    pieces = core.step().pieces
    now_s = time.perf_counter()
    own = [piece.sequence for piece in pieces if piece.sequence.startswith("answer") and piece.tokens]
    gaps = [1000 * (now_s - last_s[name]) for name in own if name in last_s]
    last_s.update(dict.fromkeys(own, now_s))
    return gaps


def answer(shape: ModelConfig, name: str, prompt_len: int, new: int, chance: random.Random) -> Answer:
    tokens = [chance.randrange(shape.vocabulary) for _ in range(prompt_len)]
    greedy = SamplingChoice(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    sequence = Generation(name, tokens, prompt_len, 0, prompt_len + new, greedy, ignore_eos=True)
    return Answer(sequence, TextStream((), ()), text_offset=0, token_offset=0, carries_tokens=True)


def build(config: TorchEngineConfig, *, device: torch.device, dtype: torch.dtype) -> Bench:
    """The model of its folder; with random weights if that holds none."""
    folder, capacity = config.model_dir, config.capacity
    shape = parse_config(json.loads((folder / "config.json").read_text()))
    backend = choose_backend(shape, config, cores=1, device=device, dtype=dtype)
    layers = range(shape.layers)
    weights: ModelWeights[Any] = (
        load_weights(folder, shape, layers, backend.factory, lambda fraction: None)
        if any(folder.glob("*.safetensors"))
        else random_weights(shape, backend.factory)
    )
    tokens = max(capacity * (PROMPT + NEW), RUNNING * shape.context // 2) + 8 * LONG_PROMPT
    blocks = tokens // backend.block_tokens + capacity + 1
    model = backend.build(weights, blocks, shape.context)
    scheduler = Scheduler(
        BlockPool(blocks, backend.block_tokens, prefix_cache=False), capacity=capacity, chunk_max=2048
    )
    core = EngineCore(Runner(model, device=device, depth=backend.depth), scheduler, eos=frozenset())
    return Bench(core, shape, model.kind, matrix_values(shape) * dtype.itemsize)


def random_weights(shape: ModelConfig, factory: MatrixFactory[Any]) -> ModelWeights[Any]:
    device, dtype = factory.device, factory.dtype

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype).mul_(size[-1] ** -0.5)

    def norm() -> RmsNorm:
        return RmsNorm(torch.ones(shape.hidden, device=device, dtype=dtype), shape.norm_eps)

    heads = shape.heads * shape.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            qkv=factory.build(values(heads + 2 * shape.kv_heads * shape.head_dim, shape.hidden)),
            query_norm=None,
            key_norm=None,
            output=factory.build(values(shape.hidden, heads)),
            mlp_norm=norm(),
            gate_up=factory.build(values(2 * shape.intermediate, shape.hidden)),
            down=factory.build(values(shape.hidden, shape.intermediate)),
        )
        for _ in range(shape.layers)
    )
    embedding, head = values(shape.vocabulary, shape.hidden), factory.build(values(shape.vocabulary, shape.hidden))
    return ModelWeights(layers, embedding, norm(), head)


def peer_line(folder: Path, options: argparse.Namespace) -> str:
    python = BENCH_FOLDER / f"venv-{TRANSFORMERS.name}" / "bin" / "python"
    if not python.exists():
        return "transformers: skipped, no venv of it; `python -m benchmarks.engine --peers transformers` makes one"
    chance = random.Random(options.seed)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = [[chance.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(options.concurrent)]
    command = [str(python), "-u", str(PEERS_FOLDER / "transformers_cuda.py"), "--model", str(folder.resolve())]
    command += ["--threads", "4", "--requests", str(options.concurrent), "--context", str(PROMPT + options.new)]
    try:
        driver = Driver(command, {}, BENCH_FOLDER, BENCH_FOLDER / "transformers-cuda.log")
    except DriverFailed as error:
        return f"transformers: skipped, {error}"
    try:
        driver.burst(prompts[:2], 16, PEER_LIMIT_S)
        rate = decode_rate(token_times(driver.burst(prompts, options.new, PEER_LIMIT_S)))
    except DriverFailed as error:
        return f"transformers: failed, {error}"
    finally:
        driver.close()
    return f"transformers, continuous batching, {options.concurrent} at once: {rate or 0:.0f} tokens/s"


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written ones; the best of ten."""
    source = torch.ones(COPY_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * COPY_BYTES / best_s


def folders(options: argparse.Namespace) -> dict[str, Path]:
    """By name. That of the 8B holds its config alone."""
    found: dict[str, Path] = {}
    for name in cast(Sequence[str], options.models.split(",")):
        if name == "8b":
            found[name] = BENCH_FOLDER / "llama-8b-shaped"
            found[name].mkdir(parents=True, exist_ok=True)
            (found[name] / "config.json").write_text(json.dumps(EIGHT_BILLION))
        else:
            found[name] = options.model
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b,default", help="8b, default, or both")
    parser.add_argument("--model", type=Path, default=Path("var/models/smollm2-135m-instruct"), help="the default one")
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--seconds", type=float, default=10.0, help="that long prompts arrive")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
