"""A contender's driver as a process: bursts in, times of tokens out, and the memory of all that it started."""

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.figures import Arrivals

READY_LIMIT_S = 600.0  # the first start of a peer may compile
CLOSE_LIMIT_S = 60.0


class DriverFailed(Exception):
    """The driver ended, or did not answer in time; says which, with the end of its log."""


class Driver:
    """Started at once; `ready` holds what it said about itself. Raises DriverFailed."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        folder: Path,
        log: Path,
        *,
        ready_limit_s: float = READY_LIMIT_S,
        close_limit_s: float = CLOSE_LIMIT_S,
    ) -> None:
        """close_limit_s: how long it may take to go by itself before it is killed."""
        self._log = log
        self._close_limit_s = close_limit_s
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ready: dict[str, Any] = self._answer(ready_limit_s)
        except DriverFailed:
            self.close()
            raise

    def burst(self, prompts: Sequence[Sequence[int]], new: int, limit_s: float) -> Arrivals:
        answer = self.ask({"do": "burst", "prompts": prompts, "new": new}, limit_s)
        arrivals: Arrivals = answer["arrivals"]
        if any(sum(tokens for _, tokens in one) != new for one in arrivals):
            raise DriverFailed(f"not every request got its {new} tokens; see {self._log}")
        return arrivals

    def ask(self, asked: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; reading says how
        return self._answer(limit_s)

    def peak_mib(self) -> tuple[float, float]:
        """Of all its processes together, and of the largest. Pages that two of them share count twice."""
        peaks = [peak for pid in process_tree(self.process.pid) if (peak := peak_memory_mib(pid)) is not None]
        return sum(peaks), max(peaks, default=0.0)

    def close(self) -> None:
        """End of input is how a driver is told to go."""
        tree = process_tree(self.process.pid)
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(self._close_limit_s)
        except subprocess.TimeoutExpired:
            for pid in tree:
                kill(pid)
            self.process.wait(CLOSE_LIMIT_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise DriverFailed(f"no answer within {limit_s:.0f} s; see {self._log}") from None
        if not line:
            status = self.process.wait(CLOSE_LIMIT_S)
            said = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
            raise DriverFailed(f"ended with status {status}: {said[-1] if said else 'no word'} ({self._log})")
        answer: dict[str, Any] = json.loads(line)
        return answer


def process_tree(root: int) -> list[int]:
    """The process and all its descendants (Linux: /proc)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", and a name may hold spaces and parentheses
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def peak_memory_mib(pid: int) -> float | None:
    """The most that was resident at once, loading included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
