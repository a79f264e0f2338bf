"""The layout record: how many cells this server's data has, and which version of the protocol wrote it.

Written once, by whoever starts first. A role that was told another number of cells must not start: half of the jobs
would look for their model in the wrong cell.
"""

import msgspec

from bus.keys import LAYOUT_KEY
from bus.link import ServerAddress, client

LAYOUT_VERSION = 1


class Layout(msgspec.Struct, frozen=True):
    version: int
    cells: int


class LayoutMismatch(Exception):
    """The server's data was laid out otherwise; the message is one line that says what to do."""


async def read_layout(address: ServerAddress) -> Layout | None:
    """None if nobody has written it yet. Raises LayoutMismatch for one that is not ours, or what the server says."""
    async with client(address) as redis:
        raw = await redis.get(LAYOUT_KEY)
    if raw is None:
        return None
    try:
        found = msgspec.json.decode(raw, type=Layout)
    except msgspec.DecodeError as error:
        problem = f"{LAYOUT_KEY} on {address} is not ours: use another database or delete that key"
        raise LayoutMismatch(problem) from error
    if found.version != LAYOUT_VERSION:
        raise LayoutMismatch(
            f"{address} holds layout version {found.version}, this release speaks {LAYOUT_VERSION}: "
            "upgrade all roles, or use another server"
        )
    return found


async def check_layout(address: ServerAddress, cells: int) -> Layout:
    """Write the layout if there is none. Raises LayoutMismatch, or what the server says."""
    wanted = Layout(version=LAYOUT_VERSION, cells=cells)
    async with client(address) as redis:
        await redis.set(LAYOUT_KEY, msgspec.json.encode(wanted), nx=True)
    found = await read_layout(address) or wanted
    if found.cells != cells:
        raise LayoutMismatch(
            f"{address} was laid out with {found.cells} cells: "
            f"set MILLRACE_CELLS={found.cells}, or empty the server first"
        )
    return found
