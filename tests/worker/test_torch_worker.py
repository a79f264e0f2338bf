"""A torch worker on a real server: what its beats say is so, and nothing that its engine does holds them up."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from bus.codec.wire import NodeView
from bus.settings import Settings
from gpu_worker.torch_engine.assembly import Assembled, assemble
from gpu_worker.torch_engine.bridge import TorchEngine
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.plan import Plan
from gpu_worker.torch_engine.runner import Flight, Result, Runner
from tests.conftest import wait_until
from tests.harness.servers import ValkeyServer
from tests.torch_engine.tiny import tiny_model
from tests.worker.house import SETTINGS, House, open_house, serving

STEP_S = 1.8  # longer than a lease of the house


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server.url) as house:
        yield house


class HeavyRunner:
    """The engine's own runner; each step takes `extra_s` of products beside its own."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.depth = runner.depth
        self.extra_s = 0.0
        self.heavy_steps = 0

    def launch(self, plan: Plan, before: Flight | None) -> Flight:
        if self.extra_s:
            self.heavy_steps += 1
            matrix = torch.ones(600, 600)
            end_s = time.monotonic() + self.extra_s
            while time.monotonic() < end_s:
                torch.mm(matrix, matrix)
        return self._runner.launch(plan, before)

    def read(self, flight: Flight) -> list[Result]:
        return self._runner.read(flight)

    def clear(self, blocks: list[int]) -> None:
        self._runner.clear(blocks)


@asynccontextmanager
async def torch_worker(house: House, model_dir: Path, **changes: object) -> AsyncIterator[HeavyRunner]:
    """A worker in this process whose engine can be made heavy."""
    settings: Settings = SETTINGS.changed(
        redis_url=house.url, node_id="t1", engine="torch", model="echo", threads=1, dtype="float32", **changes
    )
    runners: list[HeavyRunner] = []

    def with_heavy_runner(config: TorchEngineConfig) -> Assembled:
        assembled = assemble(config)
        runners.append(HeavyRunner(assembled.core.runner))
        assembled.core.runner = runners[0]  # type: ignore[assignment] # it does all that the core asks of one
        return assembled

    config = dataclasses.replace(TorchEngineConfig.from_settings(settings, model_dir), prefix_cache=False)
    engine = TorchEngine(config, assemble=with_heavy_runner)
    async with serving(house, settings, engine):
        yield runners[0]


async def node_when(house: House, holds: Callable[[NodeView], bool], timeout_s: float = 10.0) -> NodeView:
    """The first view of the node of which this holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            view: NodeView = await house.node("t1")
            if holds(view):
                return view
            await asyncio.sleep(0.01)


async def test_beats_and_leases_never_wait_for_the_engine(house: House, model_dir: Path):
    """A step longer than the lease: beats go out on time, the lease holds throughout, and the job ends at once."""
    async with torch_worker(house, model_dir) as runner:
        runner.extra_s = STEP_S
        job_id = await house.submit("a long thought", max_tokens=2, ignore_eos=True)
        await wait_until(lambda: runner.heavy_steps)
        views: list[NodeView] = []
        while runner.heavy_steps < 2:
            views.append(await house.node("t1"))
            await asyncio.sleep(0.02)
        runner.extra_s = 0.0
        end = await house.end_of(job_id)

    beats_ms = sorted({view.last_beat_ms for view in views})
    assert len(beats_ms) >= 1000 * STEP_S / SETTINGS.beat_ms - 1
    assert max(after - before for before, after in itertools.pairwise(beats_ms)) < SETTINGS.beat_ms + 250
    assert all(view.leased and view.alive for view in views)
    assert (end.state, len(house.told[job_id].attempts)) == ("done", 1)


async def test_what_a_worker_beats_is_so(house: House, model_dir: Path):
    """Rates are there before the first job and stay after the last one; the capacity follows the blocks."""
    async with torch_worker(house, model_dir, kv_tokens=1024, capacity=4) as runner:
        fresh = await house.node("t1")
        runner.extra_s = 0.02  # so long that a beat tells of it
        job_id = await house.submit("x" * 700, max_tokens=100, ignore_eos=True)
        busy = await node_when(house, lambda node: node.free_blocks < fresh.total_blocks // 3)
        runner.extra_s = 0.0
        await house.end_of(job_id)
        after = await node_when(house, lambda node: node.free_blocks == fresh.total_blocks)

    assert fresh.prefill_rate > 0 and fresh.decode_rate > 0, "measured by the warm-up"
    assert (fresh.capacity, fresh.free_blocks, fresh.waiting) == (2, fresh.total_blocks, 0)
    assert busy.capacity == 1, "its one long sequence leaves no room for another"
    assert after.prefill_rate > 0 and after.decode_rate > 0
    assert 1 <= after.capacity <= 4
