"""Where the output of a fleet's processes goes: to the terminal with coloured prefixes, and to bounded files.

A terminal may be slow or stopped (Ctrl-S); the fleet must not wait for it. So terminal lines pass through a bounded
queue to a thread of their own and are dropped when it is full, with a note of how many. The files have all of them.
"""

import io
import os
import queue
import sys
import threading
from pathlib import Path
from typing import TextIO

from honcho.colour import get_colours

WAITING_LINES_MAX = 10_000


class Terminal:
    """Prints `role | line`; safe to call from the event loop, never blocks."""

    def __init__(self, output: TextIO = sys.stdout, width: int = 10) -> None:
        self._output = output
        self._width = width
        self._colours = get_colours()
        self._colour_of: dict[str, str] = {}
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._print_all, name="terminal", daemon=True)
        self._thread.start()

    def role_line(self, role: str, line: str) -> None:
        prefix = f"{role:<{self._width}} | "
        if self._output.isatty():
            colour = self._colour_of.setdefault(role, next(self._colours))
            prefix = f"\033[{colour}m{prefix}\033[0m"
        self.line(prefix + line)

    def line(self, line: str) -> None:
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines not shown here: the terminal was too slow)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float = 1.0) -> None:
        """Print what waits, but not longer than this."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _print_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                print(line, file=self._output, flush=self._lines.empty())
            except (OSError, ValueError):  # the terminal was closed; the files go on
                continue


def open_private(path: Path) -> io.FileIO:
    """For appending; readable by its owner only, whatever the logs of a fleet may say."""
    file = io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab")
    os.fchmod(file.fileno(), 0o600)
    return file


class LogFile:
    """Appends lines to a file; beyond `size_max` bytes the file becomes `<name>.1`, of which one is kept."""

    def __init__(self, path: Path, size_max: int) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._size_max = size_max
        self._file = open_private(path)
        self._size = path.stat().st_size

    def write(self, line: bytes) -> None:
        if self._size + len(line) + 1 > self._size_max and self._size > 0:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = open_private(self.path)
            self._size = 0
        try:
            self._file.write(line + b"\n")
        except OSError as error:  # a full disk must not take the fleet down
            print(f"cannot write {self.path}: {error}", file=sys.stderr)
            return
        self._size += len(line) + 1

    def close(self) -> None:
        self._file.close()
