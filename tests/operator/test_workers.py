"""The workers of a fleet: its own ones, which it waits for, and those that join it, which end with it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bus.ids import NodeId
from bus.link import ServerAddress, client
from bus.settings import Settings
from millrace.own_workers import Ownership, ownerships, worker_lines
from tests.operator.fleet import DISPATCHER, GATEWAYS, REGISTRY, WORKER, UpProcess, wait_for

Start = Callable[..., UpProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as endings:

        def make(*lines: str, **settings: str) -> UpProcess:
            fleet = UpProcess(tmp_path, *lines, settings=settings)
            endings.callback(fleet.close)
            return fleet

        yield make


def test_the_workers_of_a_procfile_are_told_from_its_other_lines() -> None:
    lines = {
        "gateway": "exec python -m gateway",
        "worker": 'exec "${PYTHON:-python}" -m gpu_worker',
        "relay": "exec python -m gpu_worker --engine relay",
        "echo": "exec python -m gpu_worker --engine=echo",
    }

    assert worker_lines(Settings(), lines) == ["worker", "echo"]
    assert worker_lines(Settings().changed(engine="relay"), lines) == ["echo"]


def test_what_workers_own_is_read_from_their_locks_and_what_relays_serve_is_not_theirs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "a-1.lock").write_text("owns 0 a-1 a-1.17\n")
    (run / "r-1.lock").write_text("lease 0 relay:r-1.5\nowns 0 gpu.box relay:r-1.5\nnonsense\nowns x y\n")

    assert ownerships(tmp_path) == {Ownership(0, NodeId("a-1"), "a-1.17")}
    assert ownerships(tmp_path / "none") == frozenset()


def test_the_fleet_is_ready_only_with_its_own_worker(start: Start) -> None:
    """The gateways here are ready at once, as with an HTTP node that the server still knows after a restart."""
    fleet = start(*GATEWAYS, WORKER, REGISTRY)
    fleet.wait_until_ready()

    listed = fleet.command("nodes").stdout
    assert "-echo-1" in listed and "active" in listed


def test_without_its_own_worker_the_fleet_waits(start: Start) -> None:
    """Nobody applies the worker's beats here, so it gets no jobs."""
    fleet = start(*GATEWAYS, WORKER)
    wait_for(lambda: "ready" in fleet.output and "role=gpu_worker" in fleet.output, "the worker's own word")
    time.sleep(1.0)

    assert "Ctrl-C stops" not in fleet.output
    assert fleet.process.poll() is None


async def test_jobs_lists_what_runs_and_what_waits(start: Start) -> None:
    """Its help promises jobs, not counts."""
    fleet = start(*GATEWAYS, WORKER, REGISTRY, DISPATCHER, MILLRACE_ECHO_DELAY_MS="1000", MILLRACE_CAPACITY="1")
    fleet.wait_until_ready()
    assert fleet.command("jobs").stdout.strip() == "no job waits or runs"

    async with client(ServerAddress.parse(fleet.server_url())) as redis:
        for name in ("first", "second"):
            chat = {"model": "echo", "messages": [{"role": "user", "content": "a b c d e f g h i j k l m n o p"}]}
            await redis.xadd("millrace:{c0}:jobs", {"id": name, "job": json.dumps(chat)})

    def both() -> bool:
        rows = {line.split()[0]: line.split()[1] for line in fleet.command("jobs").stdout.splitlines()}
        return (rows.get("c0-first"), rows.get("c0-second")) == ("running", "waiting")

    wait_for(both, "one runs, one waits")


def test_a_worker_that_joined_ends_with_the_fleet_and_says_so(start: Start) -> None:
    """It would ask for the stopped server for ever."""
    fleet = start(*GATEWAYS, REGISTRY)
    fleet.wait_until_ready()
    log = (fleet.folder / "joined").open("w+b")
    command = [sys.executable, "-m", "millrace", "worker", "--engine", "echo"]
    joined = subprocess.Popen(
        command, cwd=fleet.folder, env=fleet.environ, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(lambda: b"-echo-1" in fleet.command("nodes").stdout.encode(), "the worker has joined")

        fleet.process.send_signal(signal.SIGINT)

        assert joined.wait(20) == 0
        assert "has been stopped, so this process ends as well" in (fleet.folder / "joined").read_text()
    finally:
        if joined.poll() is None:
            joined.kill()
        log.close()
