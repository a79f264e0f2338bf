"""How late a real worker's event loop and its beats are while prompts are prefilled and answers run.

    python -m benchmarks.loop_lag [--threads 1,2] [--seconds 20] [--prompt 1900] [--answers 4]

A server, registry, dispatcher and one torch worker, each a process, for each number of torch threads. First idle, then
under load: `--answers` streams run on and one long prompt follows another. Printed: the lag that the worker measures
and beats (`loop_lag_ms`, 99th percentile of 10 s; here the worst that any beat told), the longest time between two
beats, and the pieces and prompts that came meanwhile. The promise is a p99 below 20 ms.
"""

import argparse
import asyncio
import itertools
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.model_directory import DEFAULT_MODEL, model_directory
from bus.cell import Cell
from bus.codec.events import NodeBeat, parse_event
from bus.ids import NodeId
from bus.keys import CellKeys
from bus.link import Link, Reader, ServerAddress
from bus.settings import Settings
from millrace import Client
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer
from tests.harness.waiting import wait_until

NODE = NodeId("measured")
BEAT_MS = 1_000
SETTLE_S = 11.0  # the figures are about the last 10 s
START_S = 90.0
WORDS = ("water", "wheel", "river", "stone", "mill", "grain", "turns", "under", "the", "and", "of", "slow", "bright")


class Watch:
    """What the worker's beats say."""

    def __init__(self) -> None:
        self.p99_ms = 0.0
        self.max_ms = 0.0
        self.beats_ms: list[int] = []  # when the server got them

    def see(self, entry_id: str, beat: NodeBeat) -> None:
        self.p99_ms = max(self.p99_ms, beat.loop_lag_ms)
        self.max_ms = max(self.max_ms, beat.loop_lag_max_ms)
        self.beats_ms.append(int(entry_id.partition("-")[0]))

    @property
    def beat_gap_ms(self) -> int:
        return max((after - before for before, after in itertools.pairwise(self.beats_ms)), default=0)


async def watch(reader: Reader, cell: Cell, seconds: float) -> Watch:
    """From SETTLE_S on, when what was before has left the worker's window. Read from the stream, whoever else does."""
    await asyncio.sleep(SETTLE_S)
    found, cursor = Watch(), "$"
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for _, entries in await reader.xread({cell.keys.nodes: cursor}, count=100, block_ms=200):
            for entry_id, fields in entries:
                cursor = entry_id
                event = parse_event(fields)
                if isinstance(event, NodeBeat):
                    found.see(entry_id, event)
    return found


async def answer_for_ever(chats: Client, counts: list[int]) -> None:
    while True:
        async for piece in chats.stream("Tell me everything about water mills.", max_tokens=400, temperature=1.0):
            counts[0] += bool(piece.text)


async def prompt_for_ever(chats: Client, length: int, counts: list[int]) -> None:
    chance = random.Random(1)
    while True:
        await chats.chat(" ".join(chance.choices(WORDS, k=length)), max_tokens=1)
        counts[1] += 1


async def measure(model: Path, threads: int, seconds: float, length: int, answers: int) -> None:
    settings = {"model_path": model, "threads": threads, "beat_ms": BEAT_MS}
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(aof="everysec") as server:
        with Fleet(server.url, Path(folder)) as fleet:
            fleet.settings = {**settings, "log_level": "warning"}
            fleet.start("registry_consumer")
            fleet.start("dispatcher")
            fleet.start("gpu_worker", node_id=NODE)
            address = ServerAddress.parse(server.url)
            link = await Link.connect(address, name="loop lag", cell_key=CellKeys(0).leases)
            async with link, Reader(address, name="loop lag reads") as reader:
                cell = Cell(link, 0, Settings())
                await wait_until(lambda: is_up(cell), timeout_s=START_S)
                show(threads, "idle", await watch(reader, cell, seconds), [0, 0])
                async with Client(server.url) as chats:
                    show(threads, "busy", *await watch_busy(reader, cell, chats, seconds, length, answers))


async def is_up(cell: Cell) -> bool:
    view = await cell.node(NODE)
    return view is not None and view.usable(0) and view.leased


async def watch_busy(
    reader: Reader, cell: Cell, chats: Client, seconds: float, length: int, answers: int
) -> tuple[Watch, list[int]]:
    """What is seen, and the pieces and prompts that came, from the start of the load on."""
    counts = [0, 0]
    async with asyncio.TaskGroup() as group:
        load = [group.create_task(answer_for_ever(chats, counts)) for _ in range(answers)]
        load.append(group.create_task(prompt_for_ever(chats, length, counts)))
        found = await watch(reader, cell, seconds)
        for task in load:
            task.cancel()
    return found, counts


def show(threads: int, kind: str, found: Watch, counts: list[int]) -> None:
    print(
        f"| {threads} | {kind} | {found.p99_ms:.1f} | {found.max_ms:.1f} | {found.beat_gap_ms} of {BEAT_MS}"
        f" | {counts[0]} | {counts[1]} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How late a worker's event loop is under load.")
    parser.add_argument("--model", type=model_directory, default=str(DEFAULT_MODEL))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--prompt", type=int, default=1900, help="words of each long prompt")
    parser.add_argument("--answers", type=int, default=4)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the roles end with the benchmark
    print("| threads | | loop lag p99 ms | longest ms | longest between beats ms | pieces | prompts |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for threads in options.threads.split(","):
        asyncio.run(measure(options.model, int(threads), options.seconds, options.prompt, options.answers))


if __name__ == "__main__":
    main()
