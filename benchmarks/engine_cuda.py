"""The torch engine on a GPU: shares of the memory's roof, many at once beside transformers, time between tokens.

    python -m benchmarks.engine_cuda                        Llama-shaped 8B with random weights, and the default model
    python -m benchmarks.engine_cuda --models default --concurrent 64 --seconds 20
    python3 -m benchmarks.engine_cuda --peer-python python3     a machine whose own Python has torch and transformers

Without a GPU it says so and ends. The roof is the rate of a copy on this GPU in this run, bytes read and written. The
default model has random weights too where its files are not. The peer is transformers' continuous batching, on the same
GPU, with random weights of the same shape, and the same dtype, prompts and lengths, after our engine has given its
memory back: in the venv that `python -m benchmarks.engine` makes, or with the Python that `--peer-python` names.

Our figures come first, then the peer's. Each part gets an equal share of what is left of `--limit-s`; one that is not
done by then is left out, with a line that says so, and so is one that fails.
"""

import argparse
import dataclasses
import gc
import json
import logging
import math
import random
import shutil
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

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
DEFAULT_MODEL = EIGHT_BILLION | {  # the shape of SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
SHAPES = {"8b": EIGHT_BILLION, "default": DEFAULT_MODEL}
PROMPT, NEW = 128, 256
LONG_PROMPT, LONG_EVERY_S = 2000, 0.5
RUNNING = 16  # answers that run while long prompts arrive
COPY_BYTES = 4 << 30
CLOSE_LIMIT_S = 10.0  # of a peer, before it is killed


class OutOfTime(Exception):
    """A part was not done within its share of the time. Says what it was doing."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str
    folder: Path  # of our engine; with random weights if it holds none
    peer_folder: Path  # its config alone


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model's engine. A token's time is when the host has it."""

    core: EngineCore
    shape: ModelConfig
    kind: str
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Run:
    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    roof: float  # bytes/s
    rates: dict[str, float] = dataclasses.field(default_factory=dict)  # our tokens/s of many at once, by model


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU")
        return
    log = logging.StreamHandler()
    log.setFormatter(logging.Formatter("%(message)s. %(reason)s", defaults={"reason": ""}))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    device = torch.device("cuda")
    roof = copy_rate(device)
    show(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {roof / 1e12:.2f} TB/s")
    measure_all(Run(options, device, torch.bfloat16, roof))


def show(line: str) -> None:
    print(line, flush=True)


def measure_all(run: Run) -> None:
    """Everything of every model: of a part that fails or takes too long it is said, and the next one begins."""
    until_s = time.perf_counter() + run.options.limit_s
    models = [subject(name, run.options) for name in run.options.models.split(",")]
    parts = 2 * len(models)
    for model in models:
        try:
            own_part(run, model, share_s(until_s, parts))
        except OutOfTime as error:
            show(f"the rest of it skipped, its share of the time is over: {error}")
        except Exception as error:  # noqa: BLE001 - whatever fails here, the other parts are still worth their time
            traceback.print_exc()
            show(f"the rest of it skipped: {error!r}")
        gc.collect()
        torch.cuda.empty_cache()
        parts -= 1
    show("")
    for model in models:
        show(f"{model.name}: {peer_line(run, model, share_s(until_s, parts))}")
        parts -= 1


def share_s(until_s: float, parts: int) -> float:
    """Of what is left until then, for the next of so many parts."""
    return max(0.0, until_s - time.perf_counter()) / parts


def own_part(run: Run, model: Subject, limit_s: float) -> None:
    """Raises OutOfTime. The engine's start is not interrupted."""
    until_s = time.perf_counter() + limit_s
    options = run.options
    config = TorchEngineConfig(model_dir=model.folder, capacity=max(options.concurrent, 2 * RUNNING))
    bench = build(config, device=run.device, dtype=run.dtype)
    source = f"from {model.folder}" if holds_weights(model.folder) else "random"
    show(f"\n{model.name}: {bench.weight_bytes / 2**30:.1f} GiB of weights, {source}; attention {bench.kind}")
    chance = random.Random(options.seed)
    burst(bench, 2, 16, chance, until_s)  # what is set up once
    for count in (1, options.concurrent):
        rate = decode_rate(token_times(burst(bench, count, options.new, chance, until_s)))
        show(f"{count} at once: {rate_of_roof(run, bench, count, rate)}")
        if rate is not None and count == options.concurrent:
            run.rates[model.name] = rate
    show(stall_line(bench, min(options.seconds, until_s - time.perf_counter()), chance))


def rate_of_roof(run: Run, bench: Bench, count: int, rate: float | None) -> str:
    if rate is None:
        return "never all at the same time"
    tokens = PROMPT + run.options.new / 2
    cost = step_cost(
        bench.shape, requests=count, tokens=tokens, weight_bytes=bench.weight_bytes, kv_itemsize=run.dtype.itemsize
    )
    share = cost.bytes_read * rate / count / run.roof
    return f"{rate:.0f} tokens/s, {share:.0%} of the roof of {run.roof * count / cost.bytes_read:.0f}"


def burst(bench: Bench, count: int, new: int, chance: random.Random, until_s: float = math.inf) -> Arrivals:
    """All at once, step by step, with the time of every token. Raises OutOfTime."""
    came: dict[str, list[tuple[float, int]]] = {str(n): [] for n in range(count)}
    began_s = time.perf_counter()
    for name in came:
        bench.core.add(answer(bench.shape, name, PROMPT, new, chance))
    while not bench.core.idle:
        for piece in bench.core.step().pieces:
            came[piece.sequence].append((time.perf_counter() - began_s, len(piece.tokens)))
        if time.perf_counter() > until_s:
            abandon(bench.core, came)
            raise OutOfTime(f"{count} at once did not end within {time.perf_counter() - began_s:.0f} s")
    return list(came.values())


def abandon(core: EngineCore, names: Collection[str]) -> None:
    for name in names:
        core.cancel(name)
    while not core.idle:
        core.step()


@dataclasses.dataclass(frozen=True)
class Stalls:
    gaps_ms: list[float]  # between tokens of RUNNING answers, all the time that long prompts arrive
    prompts: int  # that arrived
    seconds: float  # measured
    preemptions: int


def stall_line(bench: Bench, seconds: float, chance: random.Random) -> str:
    stalls = stalls_beside_prompts(bench, seconds, chance)
    came = f"{RUNNING} answers while {stalls.prompts} prompts of {LONG_PROMPT} arrive in {stalls.seconds:.1f} s"
    if not stalls.gaps_ms:
        return f"{came}: no time was left to measure"
    p50, p99 = percentile(stalls.gaps_ms, 0.5), percentile(stalls.gaps_ms, 0.99)
    return (
        f"{came}: between tokens p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.1f}x), {stalls.preemptions} preempted"
    )


def stalls_beside_prompts(bench: Bench, seconds: float, chance: random.Random) -> Stalls:
    """For so long, or until the answers have filled the context."""
    core, context = bench.core, bench.shape.context
    answers = [f"answer {n}" for n in range(RUNNING)]
    for name in answers:
        core.add(answer(bench.shape, name, PROMPT, context - PROMPT, chance))
    last_s: dict[str, float] = {}
    while len(last_s) < RUNNING:
        gaps_of_step(core, last_s)
    gaps: list[float] = []
    prompts: list[str] = []
    preemptions, began_s = core.scheduler.preemptions, time.perf_counter()
    while (passed_s := time.perf_counter() - began_s) < seconds and len(last_s) == RUNNING:
        if passed_s >= len(prompts) * LONG_EVERY_S:
            prompts.append(f"prompt {len(prompts)}")
            core.add(answer(bench.shape, prompts[-1], LONG_PROMPT, 1, chance))
        gaps += gaps_of_step(core, last_s)
    passed_s = time.perf_counter() - began_s
    abandon(core, answers + prompts)
    return Stalls(gaps, len(prompts), passed_s, core.scheduler.preemptions - preemptions)


def gaps_of_step(core: EngineCore, last_s: dict[str, float]) -> list[float]:
    """last_s: when each answer's last token came; one that ended is taken out."""
    pieces = core.step().pieces
    now_s = time.perf_counter()
    own = [piece.sequence for piece in pieces if piece.sequence.startswith("answer") and piece.tokens]
    gaps = [1000 * (now_s - last_s[name]) for name in own if name in last_s]
    last_s.update(dict.fromkeys(own, now_s))
    for piece in pieces:
        if piece.end is not None:
            last_s.pop(piece.sequence, None)
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
        if holds_weights(folder)
        else random_weights(shape, backend.factory)
    )
    blocks = pool_blocks(shape.context, capacity, backend.block_tokens)
    model = backend.build(weights, blocks, shape.context)
    scheduler = Scheduler(
        BlockPool(blocks, backend.block_tokens, prefix_cache=False), capacity=capacity, chunk_max=2048
    )
    core = EngineCore(Runner(model, device=device, depth=backend.depth), scheduler, eos=frozenset())
    return Bench(core, shape, model.kind, matrix_values(shape) * dtype.itemsize)


def pool_blocks(context: int, capacity: int, block_tokens: int) -> int:
    """So many that nobody is ever preempted: of a burst, and of answers up to the end of the context beside prompts."""

    def each(tokens: int) -> int:
        return -(-tokens // block_tokens)

    beside = RUNNING * each(context) + (capacity - RUNNING) * each(LONG_PROMPT + 1)
    return max(capacity * each(PROMPT + NEW), beside) + capacity  # one more each, which admission holds back


def holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


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


def peer_line(run: Run, model: Subject, limit_s: float) -> str:
    """transformers' figure and ours in its terms, or why there is none."""
    options, ours = run.options, run.rates.get(model.name)
    python = peer_python(options.peer_python)
    if python is None:
        return (
            "transformers skipped: no venv of it (`python -m benchmarks.engine --peers transformers` makes one),"
            " and --peer-python names no Python"
        )
    log = BENCH_FOLDER / "transformers-cuda.log"
    try:
        version, rate = peer_rate(python, model, options, log, limit_s)
    except DriverFailed as error:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n    ".join([f"transformers skipped: {error}", *said[-5:]])
    if rate is None:
        return f"{version}: never all {options.concurrent} at the same time"
    line = f"{version}, continuous batching, {options.concurrent} at once: {rate:.0f} tokens/s"
    return line if ours is None else f"{line}; ours {ours:.0f} is {ours / rate:.1f} times that"


def peer_python(wanted: str | None) -> str | None:
    if wanted is not None:
        found = shutil.which(wanted)
        return None if found is None else str(Path(found).absolute())  # not resolved: a venv's is a link
    python = BENCH_FOLDER / f"venv-{TRANSFORMERS.name}" / "bin" / "python"
    return str(python) if python.exists() else None


def peer_rate(
    python: str, model: Subject, options: argparse.Namespace, log: Path, limit_s: float
) -> tuple[str, float | None]:
    """What it says it is, and its decode rate. Raises DriverFailed."""
    until_s = time.perf_counter() + limit_s - CLOSE_LIMIT_S
    chance = random.Random(options.seed)
    vocabulary = json.loads((model.peer_folder / "config.json").read_text())["vocab_size"]
    prompts = [[chance.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(options.concurrent)]
    command = [python, "-u", str(PEERS_FOLDER / "transformers_cuda.py"), "--model", str(model.peer_folder.resolve())]
    command += ["--threads", "4", "--requests", str(options.concurrent), "--context", str(PROMPT + options.new)]
    driver = Driver(command, {}, BENCH_FOLDER, log, ready_limit_s=share_s(until_s, 1), close_limit_s=CLOSE_LIMIT_S)
    try:
        driver.burst(prompts[:2], 16, share_s(until_s, 1))
        rate = decode_rate(token_times(driver.burst(prompts, options.new, share_s(until_s, 1))))
    finally:
        driver.close()
    return driver.ready["version"], rate


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


def subject(name: str, options: argparse.Namespace) -> Subject:
    """Raises SystemExit for a name that nobody has."""
    if name not in ("8b", "default"):
        raise SystemExit(f"no model is called {name!r}; there are: 8b, default")
    real = name == "default" and (options.model / "config.json").exists()
    config = json.loads((options.model / "config.json").read_text()) if real else SHAPES[name]
    shaped = BENCH_FOLDER / f"{name}-shaped"
    shaped.mkdir(parents=True, exist_ok=True)
    (shaped / "config.json").write_text(json.dumps(config))
    return Subject(name, options.model if real else shaped, shaped)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b,default", help="8b, default, or both")
    parser.add_argument("--model", type=Path, default=Path("var/models/smollm2-135m-instruct"), help="the default one")
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--seconds", type=float, default=10.0, help="that long prompts arrive")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=570.0, help="for everything")
    parser.add_argument("--peer-python", help="a Python that has torch and transformers, in place of the venv's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
