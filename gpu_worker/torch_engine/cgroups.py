"""What a container or a service manager lets this process have: limits of its control groups.

The process is in one group of each hierarchy, and every group on the way up to the root bounds it too.

    | what           | version 2                    | version 1                                            |
    |----------------|------------------------------|------------------------------------------------------|
    | processor time | cpu.max: `max 100000`, or µs | cpu.cfs_quota_us (-1: none), cpu.cfs_period_us       |
    | memory         | memory.max: `max`, or bytes  | memory.limit_in_bytes (near 2^63: none)              |
    | memory in use  | memory.current               | memory.usage_in_bytes                                |
    | of it idle     | memory.stat: inactive_file   | memory.stat: total_inactive_file, of all groups below |

Idle file pages go as soon as memory is wanted, so they count as free, as container runtimes count them. What cannot be
read bounds nothing: no control groups, another system, files that are not shown.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of Linux; cgroups(7) and proc_pid_mountinfo(5).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
NONE = "max"


@dataclasses.dataclass(frozen=True)
class Mount:
    """A hierarchy of groups, as far as this process sees it."""

    root: str  # the group that is mounted: in a container often its own
    at: Path
    controllers: frozenset[str] | None  # None: version 2, one hierarchy for all


def allowed_cores(process: Path = PROCESS) -> int | None:
    """Processor time that the groups allow, in whole cores, rounded up and at least 1; None: no limit.

    process: its directory in /proc.
    """
    shares = [share for group in groups(process, "cpu") if (share := cpu_share(group)) is not None]
    return max(1, math.ceil(min(shares))) if shares else None


def free_bytes(process: Path = PROCESS) -> int | None:
    """Memory that the groups leave to this process; None: no limit."""
    free = [room for group in groups(process, "memory") if (room := memory_room(group)) is not None]
    return min(free, default=None)


def groups(process: Path, controller: str) -> list[Path]:
    """Directories of the process's own group and of all above it that can be seen, in each hierarchy."""
    try:
        memberships = parse_memberships((process / "cgroup").read_text())
        mounts = parse_mounts((process / "mountinfo").read_text())
    except (OSError, ValueError, IndexError):
        return []
    found: list[Path] = []
    for mount in mounts:
        if mount.controllers is None or controller in mount.controllers:
            path = memberships.get(controller if mount.controllers else "")
            if path is not None:
                found += upwards(mount, path)
    return found


def parse_memberships(text: str) -> dict[str, str]:
    """/proc/<pid>/cgroup: the group's path by controller, that of version 2 under the empty name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)  # a path may have colons of its own
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def parse_mounts(text: str) -> list[Mount]:
    """/proc/<pid>/mountinfo: id, parent, device, root, mount point, options ... - type, source, options of the type."""
    found = []
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        fields, (name, *rest) = place.split(), kind.split()
        if name not in ("cgroup", "cgroup2"):
            continue
        controllers = None if name == "cgroup2" else frozenset(rest[-1].split(","))
        found.append(Mount(_unescaped(fields[3]), Path(_unescaped(fields[4])), controllers))
    return found


def _unescaped(field: str) -> str:
    """Blanks and the like stand there as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def upwards(mount: Mount, path: str) -> Iterator[Path]:
    """The group's directory and those above it, to the mount point.

    Without a namespace of its own a container reads the host's path, of which it sees the end or nothing: what is
    mounted is then its own group.
    """
    inner = PurePosixPath(path)
    below = inner.relative_to(mount.root).parts if inner.is_relative_to(mount.root) else ()
    if ".." in below or not mount.at.joinpath(*below).is_dir():
        below = ()
    return (mount.at.joinpath(*below[:depth]) for depth in range(len(below), -1, -1))


def cpu_share(group: Path) -> float | None:
    """Cores."""
    words = _read(group / "cpu.max").split()
    if not words:
        words = [_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()]
    quota, period = (_number(word) for word in (*words, "", "")[:2])
    return quota / period if quota and period else None


def memory_room(group: Path) -> int | None:
    """Bytes below the limit, without what idle files take."""
    for limit, usage, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most = _number(_read(group / limit).strip())
        if most is not None:
            stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
            used = _number(_read(group / usage).strip()) or 0
            return max(0, most - max(0, used - (_number(stat.get(idle, "")) or 0)))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(word: str) -> int | None:
    """None: no limit, or nothing that could be read."""
    return int(word) if word.isdecimal() else None
