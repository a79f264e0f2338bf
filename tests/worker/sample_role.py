"""A role with nothing to do but die in the way its prompt file says: `python -m tests.worker.sample_role`."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from bus.ids import Holder, NodeId
from bus.process.child import ParentLine
from bus.process.exits import NameTaken, StartError
from bus.process.parent import Role, run_role
from bus.settings import Settings


async def run(settings: Settings, parent: ParentLine) -> None:
    """Ends as the word in `<var_dir>/orders` says, or lives until told to stop; notes its pid in `<var_dir>/pids`."""
    folder = Path(settings.var_dir)
    with (folder / "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    order = (folder / "orders").read_text().strip()
    if order == f"taken {settings.node_id}":
        raise NameTaken(f"{settings.node_id} lives elsewhere")
    parent.owns(0, NodeId(settings.node_id), Holder(f"{settings.node_id}.{os.getpid()}"))
    parent.ready()
    if order == "config":
        raise StartError("no model: fetch one")
    if order == "crash":
        raise RuntimeError("a bug")
    if order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "deaf":
        await asyncio.Event().wait()
    await parent.stop.wait()
    (folder / "stopped").touch()
    parent.left(0, NodeId(settings.node_id), Holder(f"{settings.node_id}.{os.getpid()}"))


def names(settings: Settings) -> Iterable[str]:
    return [settings.node_id] if settings.node_id else ["sample-1", "sample-2"]


if __name__ == "__main__":
    role = Role("tests.worker.sample_role", child="tests.worker.sample_role:run", names=names)
    sys.exit(run_role(role, sys.argv[1:], os.environ))
