"""One fleet per `var` folder: an flock that is held as long as any part of the fleet's supervision lives.

`millrace up` takes it and hands it to its warden (millrace.warden), so it is free only when both are gone, and with
them every process of the fleet. The file holds the process id of `millrace up`, which `millrace stop` signals: as
long as the lock is held, that id can belong to nobody else.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path


class FleetLock:
    """A held lock; `fd` may be handed to a child, which then keeps it too."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self.fd)


def lock_path(var_dir: Path) -> Path:
    return var_dir / "fleet.lock"


def take_lock(var_dir: Path) -> FleetLock | None:
    """The lock, or None if a fleet runs from this folder."""
    fd = os.open(lock_path(var_dir), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return FleetLock(fd)


def running_pid(var_dir: Path) -> int | None:
    """The process id of the fleet that runs from this folder; 0 if only its warden is left; None if there is none."""
    try:
        fd = os.open(lock_path(var_dir), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _alive(os.pread(fd, 32, 0))
    finally:
        os.close(fd)
    return None


def wait_until_free(var_dir: Path, timeout_s: float) -> bool:
    """Whether the fleet ended within the time."""
    deadline = time.monotonic() + timeout_s
    while running_pid(var_dir) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _alive(written: bytes) -> int:
    """The process id if it runs, else 0. A killed process that nobody has waited for yet does not run."""
    try:
        pid = int(written)
        os.kill(pid, 0)
    except (ValueError, OSError):
        return 0
    with contextlib.suppress(OSError):  # Linux
        if Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z":
            return 0
    return pid
