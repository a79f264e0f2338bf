"""When a lease is renewed, and when its holder must fall silent."""

import subprocess
import sys

from bus.process.exits import EXIT_CRASH
from gpu_worker.engine import EngineLoad
from gpu_worker.lease import LeaseClock, StallWatch
from tests.harness.servers import ValkeyServer


def load(*, idle: bool, progress_s: float = 0.0) -> EngineLoad:
    return EngineLoad(
        prefill_rate=1,
        decode_rate=1,
        capacity=1,
        running=0 if idle else 1,
        waiting=0,
        idle=idle,
        last_progress_s=progress_s,
    )


def test_an_idle_engine_is_never_stalled_however_long_it_rests():
    watch = StallWatch(60, now_s=0)

    assert not any(watch.is_stalled(load(idle=True), now_s) for now_s in (0, 100, 10_000))


def test_a_busy_engine_is_stalled_after_the_limit_without_progress():
    """Alive but deaf must lapse: its jobs run elsewhere."""
    watch = StallWatch(60, now_s=0)

    assert not watch.is_stalled(load(idle=False, progress_s=100), 159)
    assert watch.is_stalled(load(idle=False, progress_s=100), 161)
    assert not watch.is_stalled(load(idle=False, progress_s=162), 163)


def test_the_limit_counts_from_the_start_of_work_not_from_progress_before_a_rest():
    watch = StallWatch(60, now_s=0)
    watch.is_stalled(load(idle=True, progress_s=5), 1000)

    assert not watch.is_stalled(load(idle=False, progress_s=5), 1002)
    assert watch.is_stalled(load(idle=False, progress_s=5), 1061)


def test_a_holder_is_fenced_once_its_last_success_is_too_old():
    """Another worker may hold the node as soon as the lease lapses, so this one is silent before."""
    clock = LeaseClock(8, now_s=100)

    assert not clock.is_fenced(108)
    assert clock.is_fenced(108.1)
    clock.renewed_s = 109
    assert not clock.is_fenced(110)


BROKEN = """
import asyncio, sys
from bus.ids import Holder, NodeId
from bus.link import ServerAddress
from bus.settings import Settings
from gpu_worker.lease import LeaseThread, Tenure

async def main():
    settings = Settings().changed(renew_ms=50, self_fence_ms=400, lease_ms=500)
    lease = LeaseThread(ServerAddress.parse(sys.argv[1]), settings, cells=[0], name="n1")
    await lease.start()
    never = dict.fromkeys(("on_renewed", "on_superseded", "on_stalled"), print)
    none = {"listed": list, "deaf_s": float}
    lease.add(Tenure(0, NodeId("n1"), Holder("n1.1"), settings, load=lambda: 1 / 0, **none, **never))
    await asyncio.sleep(20)

asyncio.run(main())
"""


def test_a_lease_thread_that_fails_by_a_bug_takes_its_process_along(server: ValkeyServer):
    """Without its lease a worker is fenced for ever and nobody tells it; its parent can only help one that died."""
    command = [sys.executable, "-c", BROKEN, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)

    assert done.returncode == EXIT_CRASH, done.stderr
    assert "the lease thread crashed" in done.stderr and "ZeroDivisionError" in done.stderr
