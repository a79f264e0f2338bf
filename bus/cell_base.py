"""What all calls of a cell share: its link, its keys, its settings."""

from collections.abc import Sequence
from typing import Any

from bus.ids import NodeId
from bus.keys import CellKeys
from bus.link import Link
from bus.scripts import load_script
from bus.settings import Settings


class CellBase:
    def __init__(self, link: Link, cell: int, settings: Settings) -> None:
        self.link = link
        self.cell = cell
        self.keys = CellKeys(cell)
        self.settings = settings

    async def _call(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        return await self.link.script(load_script(name), keys, args)

    def _node_keys(self, node: NodeId) -> list[str]:
        """In the order in which scripts take a node's keys."""
        keys = self.keys
        return [keys.node(node), keys.node_running(node), keys.node_load(node), keys.node_jobs(node)]
