"""A fleet of real processes for end-to-end tests: each role under its restarting parent, as the Procfile runs it.

    with Fleet(server.url, tmp_path, lease_ms=1000, ...) as fleet:
        fleet.start("dispatcher")
        worker = fleet.start("gpu_worker", "--engine", "echo")
        worker.kill_child()          # SIGKILL of the process that does the work
        worker.kill()                # SIGKILL of parent and child, like a machine that is gone

Settings are given as `MILLRACE_*` variables; nothing else of the test's environment reaches the roles.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]

# Short times, so that a test that waits for a lease to lapse waits a second.
QUICK = {
    "lease_ms": 1_500,
    "renew_ms": 300,
    "self_fence_ms": 1_200,
    "node_ttl_ms": 3_000,
    "beat_ms": 500,
    "unread_ms": 1_500,
    "sweep_ms": 200,
    "block_ms": 500,
    "silence_ms": 1_500,
    "claim_idle_ms": 1_000,
    "backoff_ms": 100,
    "breaker_ms": 200,
}


class RoleProcess:
    """One role: its parent, and through it the child that does the work."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def child_pid(self, *, other_than: int = 0, timeout_s: float = 15.0) -> int:
        """The child that runs now; waits for one, also for one `other_than` a child that was killed."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for pid in children_of(self.process.pid):
                if pid != other_than:
                    return pid
            time.sleep(0.01)
        raise AssertionError(f"{self.name} has no child within {timeout_s} s\n{self.tail()}")

    def kill_child(self) -> int:
        """SIGKILL the child; its parent stays. Returns the dead child's pid."""
        pid = self.child_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL parent and child: a lost machine."""
        pids = [self.process.pid, *children_of(self.process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # so that neither sees the other die
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM and wait: the graceful way. Returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop within {timeout_s} s\n{self.tail()}") from None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])


class Fleet:
    """Roles against one server; all are ended when the block is left, whatever happened in it."""

    def __init__(self, redis_url: str, var_dir: Path, **settings: object) -> None:
        self.redis_url = redis_url
        self.var_dir = var_dir
        self.settings = {**QUICK, **settings}
        self.roles: list[RoleProcess] = []

    def env(self, **settings: object) -> dict[str, str]:
        chosen = {**self.settings, **settings}
        return {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.var_dir),
            "REDIS_URL": self.redis_url,
            "MILLRACE_VAR_DIR": str(self.var_dir),
            **{f"MILLRACE_{name.upper()}": _text(value) for name, value in chosen.items()},
        }

    def start(self, role: str, *arguments: str, **settings: object) -> RoleProcess:
        name = f"{role}-{len(self.roles)}"
        command = [sys.executable, "-m", role, *arguments]
        process = RoleProcess(name, command, self.env(**settings), self.var_dir / f"{name}.log")
        self.roles.append(process)
        return process

    def stop(self) -> None:
        """The graceful way for all, the last started first; then whatever is left is killed."""
        problems = []
        for role in reversed(self.roles):
            if role.process.poll() is None:
                role.process.terminate()
        for role in reversed(self.roles):
            try:
                role.stop()
            except AssertionError as problem:
                problems.append(str(problem))
        assert not problems, "\n".join(problems)

    def __enter__(self) -> Self:
        self.var_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for role in self.roles:
                print(f"--- {role.name} (exit {role.process.poll()})\n{role.tail()}", file=sys.stderr)
        for role in self.roles:
            if role.process.poll() is None and error is not None:
                role.kill()
        self.stop()


def children_of(pid: int) -> list[int]:
    """Direct children that are alive (Linux)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split() if _alive(int(child))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _text(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
