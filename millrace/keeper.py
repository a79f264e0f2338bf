"""Keeps one process of the fleet running: a role of the Procfile, or the embedded server.

A process that ends is started again after a growing pause; it never takes the others down. Only before the fleet was
ever ready, an end that needs a person (a setting that cannot work) is reported instead, so that `millrace up` can say
so and stop. Each process leads a session of its own: Ctrl-C in the terminal reaches `millrace up` alone, which stops
the fleet in order.
"""

import asyncio
import contextlib
import dataclasses
import io
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bus.process.exits import EXIT_CONFIG
from millrace.logs import LogFile, Terminal

STABLE_S = 30.0  # a process that lived this long starts the pauses anew
PAUSE_MAX_S = 30.0
GROUP_GRACE_S = 5.0  # for what a process leaves behind in its group: a line of the Procfile without `exec`
GROUP_LOOK_S = 0.05
LINE_MAX = 64 * 1024  # a longer line is cut in pieces, so that a reader never waits for its end
NOT_RUNNABLE = frozenset({EXIT_CONFIG, 126, 127})  # 126, 127: the shell could not run the command


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to run. `shown`: its lines go to the terminal too, not only to its log file."""

    name: str
    command: tuple[str, ...]
    shown: bool = True


@dataclasses.dataclass(frozen=True)
class Ended:
    """One end of a process. A negative code is a signal."""

    name: str
    code: int
    lived_s: float
    last_line: str

    @property
    def needs_person(self) -> bool:
        return self.code in NOT_RUNNABLE

    @property
    def how(self) -> str:
        if self.code >= 0:
            return f"status {self.code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.code).name
        return f"signal {-self.code}"


def pause_s(ends_in_row: int) -> float:
    """Almost at once after the first end, then doubling: a crash loop must not eat the machine."""
    return 0.1 if ends_in_row <= 1 else min(2.0 ** (ends_in_row - 2), PAUSE_MAX_S)


def count_end(ends_in_row: int, lived_s: float) -> int:
    return 1 if lived_s >= STABLE_S else ends_in_row + 1


class Keeper:
    """on_start and on_end are told of each process; on_end returns False if it must not be started again."""

    def __init__(
        self,
        spec: Spec,
        *,
        environ: Mapping[str, str],
        folder: Path,
        terminal: Terminal,
        log_file: LogFile,
        on_start: Callable[[int], None],
        on_end: Callable[[int, Ended], bool],
    ) -> None:
        self.spec = spec
        self._environ = environ
        self._folder = folder
        self._terminal = terminal
        self._log = log_file
        self._on_start = on_start
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._last_line = ""
        self.ended = asyncio.Event()  # for good

    async def run(self) -> None:
        """Until `stop`, or until on_end says that it must not be started again."""
        ends_in_row = 0
        try:
            while not self._stopping.is_set():
                ended, pid = await self._run_once()
                again = self._on_end(pid, ended)
                if self._stopping.is_set() or not again:
                    break
                ends_in_row = count_end(ends_in_row, ended.lived_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s(ends_in_row)):
                        await self._stopping.wait()
        finally:
            self._log.close()
            self.ended.set()

    async def stop(self, grace_s: float, force: asyncio.Event) -> None:
        """SIGTERM; when the time is over or `force` is set a second one (a role then kills its child), then SIGKILL."""
        self._stopping.set()
        self._send(signal.SIGTERM)
        if not await self._ends_within(grace_s, force):
            self._send(signal.SIGTERM)
            if not await self._ends_within(1.5):
                self._send(signal.SIGKILL)
                await self._ends_within(2.0)

    async def _ends_within(self, seconds: float, force: asyncio.Event | None = None) -> bool:
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(event.wait()) for event in (self.ended, force) if event is not None]
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        return self.ended.is_set()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run_once(self) -> tuple[Ended, int]:
        began = time.monotonic()
        self._last_line = ""
        # A pipe of our own: with asyncio's, the end of the process is told only at the end of its output, which what it
        # leaves behind may hold open.
        ours, theirs = os.pipe()
        output = open(ours, "rb", buffering=0)  # noqa: SIM115, ASYNC230 - closed by its transport
        try:
            process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env=self._environ,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=theirs,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            output.close()
            raise
        finally:
            os.close(theirs)
        self._process = process
        self._on_start(process.pid)
        if self._stopping.is_set():  # told to stop while it was being started
            self._send(signal.SIGTERM)
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(self._pump(output), name=f"output of {self.spec.name}")
            code = await process.wait()
            await end_group(process.pid)
            await asyncio.wait(
                [pump], timeout=0.2
            )  # its last words; one in a session of its own may hold the pipe open
            pump.cancel()
        return Ended(self.spec.name, code, time.monotonic() - began, self._last_line), process.pid

    async def _pump(self, output: io.FileIO) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, output)
        rest = b""
        try:
            while chunk := await reader.read(LINE_MAX):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) >= LINE_MAX:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._write(line)
        finally:
            transport.close()
        if rest:
            self._write(rest)

    def _write(self, line: bytes) -> None:
        self._log.write(line)
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._last_line = text.strip() or self._last_line
        if self.spec.shown:
            self._terminal.role_line(self.spec.name, text)


async def end_group(leader: int) -> None:
    """End what a dead process left behind in its process group, first in good order, then at once.

    A role's child is not in it: it leads a group of its own and sees its parent's end.
    """
    deadline = time.monotonic() + GROUP_GRACE_S
    left = send_to_group(leader, signal.SIGTERM)
    while left and time.monotonic() < deadline:
        await asyncio.sleep(GROUP_LOOK_S)
        left = send_to_group(leader, 0)
    send_to_group(leader, signal.SIGKILL)


def send_to_group(leader: int, number: int) -> bool:
    """Whether the group had a process to get it."""
    try:
        os.killpg(leader, number)
    except OSError:
        return False
    return True


def shell(command: str) -> tuple[str, ...]:
    """How a line of the Procfile is run; `exec` in the line saves the shell's process."""
    return ("/bin/sh", "-c", command)
