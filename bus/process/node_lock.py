"""One name, one live process on this machine: an flock that also remembers what its holder had taken.

The lock file `<var_dir>/run/<name>.lock` belongs to a worker's parent and is inherited by its child, so it is free
only once both are dead. Whoever gets it has proof of that, and may give back at once what the file lists (design 3.4,
`down`), instead of waiting for a lease to lapse. The kernel drops an flock at the death of its last holder.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path


class NodeLock:
    """A held lock. `left_behind` are the facts of the previous holder, who is dead."""

    def __init__(self, name: str, fd: int, left_behind: tuple[str, ...]) -> None:
        self.name = name
        self.fd = fd
        self.left_behind = left_behind

    def remember(self, facts: Iterable[str]) -> None:
        """Replace what the next holder would have to give back."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, "".join(f"{fact}\n" for fact in facts).encode(), 0)

    def release(self) -> None:
        os.close(self.fd)


def take_node_lock(var_dir: Path, candidates: Iterable[str]) -> NodeLock | None:
    """Lock the first free name of `candidates`; None if each is held by a live process."""
    folder = var_dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    for name in candidates:
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        text = os.pread(fd, 1 << 20, 0).decode(errors="replace")
        return NodeLock(name, fd, tuple(line for line in text.splitlines() if line))
    return None
