"""Are the workers of this fleet's own Procfile up? The gateways cannot tell: any node of the model makes them ready.

After a quick restart an HTTP node that the server still knows would let `millrace up` announce itself before its own
worker has loaded its model. What a worker of this folder owns stands in the file of its lock (bus.process.node_lock);
whether that node gets jobs, the server knows.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bus.ids import NodeId
from bus.link import LinkError
from bus.settings import Settings
from millrace.inspect import opened_cells
from millrace.preflight import CannotStart


class Ownership(NamedTuple):
    cell: int
    node: NodeId
    holder: str


class OwnWorkers:
    """Made before the roles are started: what is owned by then belongs to processes that are not ours."""

    def __init__(self, settings: Settings, lines: Mapping[str, str]) -> None:
        """settings: with the fleet's server."""
        self._settings = settings
        self._lines = worker_lines(settings, lines)
        self._earlier = ownerships(Path(settings.var_dir))

    async def missing(self) -> dict[str, str]:
        """The lines whose workers are not up yet, with what they do; empty once all are."""
        owned = ownerships(Path(self._settings.var_dir)) - self._earlier
        up = await self._count_up(owned) if len(owned) >= len(self._lines) else 0
        if up >= len(self._lines):
            return {}
        return dict.fromkeys(self._lines[up:], "it has not joined yet, it may be loading its model")

    async def _count_up(self, owned: frozenset[Ownership]) -> int:
        try:
            async with opened_cells(self._settings) as cells:
                views = [(one, await cells[one.cell].node(one.node)) for one in owned if one.cell < len(cells)]
        except (LinkError, CannotStart):
            return 0  # asked again soon
        return sum(
            view is not None and view.owner == one.holder and view.alive and view.leased and view.state != "starting"
            for one, view in views
        )


def worker_lines(settings: Settings, lines: Mapping[str, str]) -> list[str]:
    """The lines that run a worker with an engine of its own: any but relays."""
    return [name for name, command in lines.items() if _engine_of(command, settings) not in ("", "relay")]


def _engine_of(command: str, settings: Settings) -> str:
    """Of a line that runs a worker; "" for any other."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    if "gpu_worker" not in words:
        return ""
    for at, word in enumerate(words):
        if word == "--engine" and at + 1 < len(words):
            return words[at + 1]
        if word.startswith("--engine="):
            return word.removeprefix("--engine=")
    return settings.engine


def ownerships(var_dir: Path) -> frozenset[Ownership]:
    """What the workers of this folder own, or owned when they died. What relays serve is not theirs."""
    found = set()
    for file in (var_dir / "run").glob("*.lock"):
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            match line.split(" "):
                case ["owns", cell, node, holder] if cell.isdecimal() and holder.rpartition(".")[0] == node:
                    found.add(Ownership(int(cell), NodeId(node), holder))
    return frozenset(found)
