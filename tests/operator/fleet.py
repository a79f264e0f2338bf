"""Runs `millrace up` as a process of its own, on a Procfile of toy roles and an embedded server."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy_role.py")
GATEWAYS = (
    "gateway: exec $PYTHON {toy} gateway $MILLRACE_GATEWAY_PORT",
    "gateway2: exec $PYTHON {toy} gateway $MILLRACE_GATEWAY2_PORT",
)
REGISTRY = "registry: exec $PYTHON -m registry_consumer"
DISPATCHER = "dispatcher: exec $PYTHON -m dispatcher"
WORKER = "worker: exec $PYTHON -m gpu_worker"  # MILLRACE_ENGINE is echo
IDLE = "idle: exec $PYTHON {toy} idle"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """False for a zombie too: nobody may be left to reap an orphan here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not shown.startswith("Z")


class UpProcess:
    """One `millrace up` in `folder`. Everything it printed is in `output`."""

    def __init__(self, folder: Path, *lines: str, settings: Mapping[str, str] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ports = (free_port(), free_port())
        (folder / "Procfile").write_text("".join(line.format(toy=TOY) + "\n" for line in lines))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MILLRACE_", "REDIS_URL"))}
        self.environ = {
            **clean,
            "PYTHONPATH": str(ROOT),
            "MILLRACE_ENGINE": "echo",
            "MILLRACE_GATEWAY_PORT": str(self.ports[0]),
            "MILLRACE_GATEWAY2_PORT": str(self.ports[1]),
            "MILLRACE_DRAIN_GRACE_MS": "500",
            **(settings or {}),
        }
        self._printed = (folder / "printed").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "millrace", "up"],
            cwd=folder, env=self.environ, stdout=self._printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return (self.folder / "printed").read_text(errors="replace")

    def pids(self) -> list[int]:
        """Of every process that it started, by their own words and the server's file."""
        said = [int(found) for found in re.findall(r"runs as (\d+)", self.output)]
        file = self.folder / "var" / "server" / "pid"
        return said + ([int(file.read_text())] if file.exists() else [])

    def server_url(self) -> str:
        return (self.folder / "var" / "redis-url").read_text().strip()

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "millrace", *arguments],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        wait_for(lambda: "Ctrl-C stops" in self.output or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.output

    def wait_until_ended(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        wait_for(lambda: not any(is_alive(pid) for pid in self.pids()), f"all gone: {self.output}", 40)
        self._printed.close()
