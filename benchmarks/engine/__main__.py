"""The torch engine beside its peers, on this machine, in one run: decode rate, first token, time between, memory.

    python -m benchmarks.engine                                  all peers (their venvs are made on the first run)
    python -m benchmarks.engine --peers llama.cpp,vllm --rounds 3 --json var/bench/engine.json
    python -m benchmarks.engine --peers none --no-gateway --no-perplexity --levels 1,8 --new 48

For each level that many requests arrive together; all contenders get the same prompts, run on the same number of
threads, answer greedily and to the end. All are started first and then take turns, burst by burst, so that a
disturbance of the machine meets all alike; shown is the median of the rounds. See benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.engine.contenders import (
    BENCH_FOLDER,
    ENGINE,
    GATEWAY,
    ROOT,
    Contender,
    Unavailable,
    choose_peers,
    command_of,
)
from benchmarks.engine.costs import StepCost, step_cost, weight_bytes
from benchmarks.engine.dense import dense_copy
from benchmarks.engine.figures import Burst, measure, over_rounds
from benchmarks.engine.process import Driver, DriverFailed
from benchmarks.engine.report import Row, rate, skipped, table
from benchmarks.engine.roofs import Roof, describe_machine, measure_roof
from benchmarks.model_directory import DEFAULT_MODEL, model_directory
from gpu_worker.torch_engine.assembly import usable_cores
from gpu_worker.torch_engine.model_config import ModelConfig, parse_config

CONTEXT_SPARE = 64  # tokens of room beyond prompt and answer, for whoever counts in blocks
BURST_LIMIT_S = 1800.0
SETTLE_S = 0.5  # spinning threads of the one before go to sleep
WARM_UP_TOKENS = 4


@dataclasses.dataclass
class Running:
    """A contender that was started, and what it measured so far, by level."""

    contender: Contender
    driver: Driver
    bursts: dict[int, list[Burst]] = dataclasses.field(default_factory=dict)


class Prompts:
    """Prompts of ordinary words that are one token each, so text and tokens say the same."""

    def __init__(self, model: Path, seed: int) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        word = [(name.removeprefix("Ġ"), token) for name, token in tokenizer.get_vocab().items() if name[:1] == "Ġ"]
        self._words = sorted(token for text, token in word if text.isascii() and text.isalpha() and text.islower())
        self._chance = random.Random(seed)

    def one(self, length: int) -> list[int]:
        return [self._chance.choice(self._words) for _ in range(length)]

    def several(self, count: int, length: int) -> list[list[int]]:
        return [self.one(length) for _ in range(count)]


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit of time ends it like Ctrl-C
    prompts = Prompts(options.model, options.seed)
    print(describe_machine(), flush=True)
    print(
        f"prompt {options.prompt}, new {options.new} tokens, {options.threads} threads, {options.rounds} rounds;"
        " all requests of a level arrive together\n",
        flush=True,
    )
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        running = start_all(options, stack, failures)
        for contender in running:
            print(f"- {contender.contender.name}: {told(contender.driver.ready)}", flush=True)
        try:
            for number in range(options.rounds):
                for level in options.levels:
                    one_round(running, prompts, level, options, number, failures)
        except KeyboardInterrupt:
            print("interrupted; what was measured until now:", file=sys.stderr)
    # After all others have ended, and last: its arrays would count as somebody's memory.
    roofs = [measure_roof(threads) for threads in sorted({1, options.threads})]
    report(options, running, roofs, failures)
    if options.perplexity:
        print("\nperplexity of a fixed text (benchmarks/perplexity.py) by how weights are held:", flush=True)
        command = [sys.executable, "-m", "benchmarks.perplexity", "--model", str(options.model)]
        subprocess.run([*command, "--threads", str(options.threads)], cwd=ROOT, check=False)


def start_all(options: argparse.Namespace, stack: ExitStack, failures: dict[str, str]) -> list[Running]:
    """Everybody who can be started here; why not, for the others."""
    chosen = [ENGINE, *([GATEWAY] if options.gateway else []), *options.peers]
    running = []
    for contender in chosen:
        try:
            driver = start(contender, options)
        except (Unavailable, DriverFailed) as error:
            failures[contender.name] = str(error)
            continue
        stack.callback(driver.close)
        running.append(Running(contender, driver))
    return running


def start(contender: Contender, options: argparse.Namespace) -> Driver:
    own = contender.venv is None
    model = options.model if own or contender.reads_gguf else dense_copy(options.model, BENCH_FOLDER)
    wanted = dataclasses.replace(contender, dtype=options.dtype) if own else contender
    command = command_of(wanted, model=model, gguf=options.gguf)
    command += ["--threads", str(options.threads), "--requests", str(max(options.levels))]
    command += ["--context", str(options.prompt + options.new + CONTEXT_SPARE)]
    environ = {"OMP_NUM_THREADS": str(options.threads)}
    if own:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the worker has it
    else:
        environ["XDG_CACHE_HOME"] = str(BENCH_FOLDER / "cache")  # what vLLM compiles at its first start
    print(f"starting {contender.name}", file=sys.stderr, flush=True)
    BENCH_FOLDER.mkdir(parents=True, exist_ok=True)
    return Driver(command, environ, ROOT, BENCH_FOLDER / f"engine-{contender.name}.log")


def one_round(
    running: list[Running],
    prompts: Prompts,
    level: int,
    options: argparse.Namespace,
    number: int,
    failures: dict[str, str],
) -> None:
    """One burst of everybody who has not failed, all with the same prompts."""
    # Not those that are measured: our fleet keeps what it has computed of a prompt, as it does for its users.
    warm_up, measured = prompts.several(level, options.prompt), prompts.several(level, options.prompt)
    for one in running:
        if one.contender.name in failures:
            continue
        try:
            if not one.bursts:
                one.driver.burst(warm_up, WARM_UP_TOKENS, BURST_LIMIT_S)
            arrivals = one.driver.burst(measured, options.new, BURST_LIMIT_S)
            peak, largest = one.driver.peak_mib()
            burst = measure(arrivals, peak_mib=peak, largest_mib=largest, load=os.getloadavg()[0])
        except (DriverFailed, ValueError) as error:
            failures[one.contender.name] = str(error)
            continue
        one.bursts.setdefault(level, []).append(burst)
        print(
            f"round {number + 1}, {level:>2} requests, {one.contender.name:<24}"
            f" {rate(burst.decode_rate):>7} tokens/s, first {burst.first_p50_ms:.0f} ms, load {burst.load:.2f}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(SETTLE_S)


def report(
    options: argparse.Namespace,
    running: list[Running],
    roofs: list[Roof],
    failures: dict[str, str],
) -> None:
    shape = parse_config(json.loads((options.model / "config.json").read_text()))
    roof = roofs[-1]
    said = {one.contender.name: one.driver.ready for one in running}
    rows = [
        Row(one.contender.name, figures, cost_of(one, level, said.get(ENGINE.name, {}), shape, options))
        for one in running
        for level, figures in ((level, over_rounds(bursts)) for level, bursts in one.bursts.items())
    ]
    print()
    print(table(rows, bandwidth=roof.bandwidth, products=roof.product))
    if failures:
        print(f"\n{skipped(failures)}")
    print("\nroofs, of which the last two columns are shares:")
    for one_roof in roofs:
        print(
            f"- {one_roof.threads} threads: reading {one_roof.read / 1e9:.1f} GB/s,"
            f" copying {one_roof.copy / 1e9:.1f} GB/s, float32 products {one_roof.product / 1e9:.0f} GFLOP/s"
        )
    print(f"load at the end {', '.join(f'{load:.2f}' for load in os.getloadavg())}")
    if options.json:
        write_json(options.json, rows, running, roofs, failures)


def cost_of(
    one: Running, requests: int, engine: dict[str, Any], shape: ModelConfig, options: argparse.Namespace
) -> StepCost | None:
    """What a step of it reads and computes; None where its storage is not known.

    engine: what our engine said in process, which is true of the one behind the gateway too.
    """
    ready = engine if one.contender is GATEWAY else one.driver.ready
    read = weight_bytes(ready, shape, options.gguf.stat().st_size if one.contender.reads_gguf else None)
    if read is None:
        return None
    tokens = options.prompt + options.new / 2
    return step_cost(shape, requests=requests, tokens=tokens, weight_bytes=read, kv_itemsize=ready["kv_itemsize"])


def told(ready: dict[str, Any]) -> str:
    """What a driver said about itself, for people."""
    parts = [ready["version"], ready.get("storage", "")]
    if "start_s" in ready:
        parts.append(f"load and warm-up {ready['start_s']:.1f} s")
    return ", ".join(part for part in parts if part)


def write_json(
    path: Path,
    rows: list[Row],
    running: list[Running],
    roofs: list[Roof],
    failures: dict[str, str],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": describe_machine(),
        "roofs": [dataclasses.asdict(roof) for roof in roofs],
        "contenders": {one.contender.name: one.driver.ready for one in running},
        "figures": [dataclasses.asdict(row) for row in rows],
        "bursts": {
            one.contender.name: [dataclasses.asdict(burst) for bursts in one.bursts.values() for burst in bursts]
            for one in running
        },
        "not_measured": failures,
    }
    path.write_text(json.dumps(content, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_directory, default=str(DEFAULT_MODEL))
    parser.add_argument("--gguf", type=Path, default=ROOT / "var/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--levels", type=to_levels, default="1,4,8,16,32", help="requests that arrive together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every contender")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of our engine")
    parser.add_argument("--peers", type=to_peers, default="llama.cpp,vllm,transformers", help="names, beginnings, none")
    parser.add_argument("--gateway", action=argparse.BooleanOptionalAction, default=True, help="our whole fleet, too")
    parser.add_argument("--perplexity", action=argparse.BooleanOptionalAction, default=True, help="of our forms")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    return parser.parse_args()


def to_levels(text: str) -> list[int]:
    return [int(level) for level in text.split(",")]


def to_peers(text: str) -> list[Contender]:
    try:
        return choose_peers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()
