"""Give back what a dead process held: its nodes with their reservations, and its leases. Called by its parent."""

import asyncio
import logging
from collections.abc import Iterable
from itertools import groupby

from bus.cell import Cell
from bus.ids import Holder, NodeId
from bus.keys import CellKeys
from bus.link import Link, LinkError, ServerAddress
from bus.settings import Settings

RETRY_S = 0.2

log = logging.getLogger(__name__)


async def release(settings: Settings, facts: Iterable[str]) -> None:
    """Call `down` for each "owns <cell> <node> <holder>" and drop each "lease <cell> <holder>"; retries for ever.

    Both scripts check the holder, so that a repeat, or a call after a new child took over, changes nothing.
    """
    by_cell = groupby(sorted(facts, key=cell_of), key=cell_of)
    async with asyncio.TaskGroup() as group:
        for cell, held in [(cell, list(held)) for cell, held in by_cell]:
            group.create_task(_release_in_cell(settings, cell, held), name=f"release in cell {cell}")


def cell_of(fact: str) -> int:
    return int(fact.split(" ")[1])


async def _release_in_cell(settings: Settings, cell_number: int, facts: list[str]) -> None:
    while True:
        try:
            key = CellKeys(cell_number).leases
            link = await Link.connect(ServerAddress.parse(settings.redis_url), name="parent", cell_key=key)
            try:
                cell = Cell(link, cell_number, settings)
                for fact in facts:
                    await _release_fact(cell, fact)
            finally:
                await link.close()
            return
        except LinkError as error:
            log.warning("could not give back yet, trying again", extra={"cell": cell_number, "error": str(error)})
            await asyncio.sleep(RETRY_S)


async def _release_fact(cell: Cell, fact: str) -> None:
    match fact.split(" "):
        case ["owns", _, node, holder]:
            requeued = await cell.down(NodeId(node), Holder(holder))
            log.info("took down a dead process' node", extra={"node": node, "holder": holder, "requeued": requeued})
        case ["lease", _, holder]:
            await cell.drop_lease(Holder(holder))
            log.info("dropped a dead process' lease", extra={"holder": holder})
