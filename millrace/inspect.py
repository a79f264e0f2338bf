"""`millrace nodes` and `millrace jobs`: what the server knows, asked once."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from bus.cell import Cell
from bus.codec.wire import CellView, JobRecord, NodeView, QueueView
from bus.ids import JobId, parse_cell
from bus.keys import CellKeys
from bus.layout import LayoutMismatch, read_layout
from bus.link import Link, ServerAddress, check_server
from bus.settings import Settings
from millrace.preflight import CannotStart
from millrace.table import to_table

LISTED_MAX = 20  # jobs of one queue or node in a list


@asynccontextmanager
async def opened_cells(settings: Settings) -> AsyncIterator[list[Cell]]:
    """All cells of the server, as many as its layout says. Raises CannotStart and LinkError."""
    address = ServerAddress.parse(settings.redis_url)
    await check_server(address)
    try:
        layout = await read_layout(address)
    except LayoutMismatch as error:
        raise CannotStart(str(error)) from error
    count = layout.cells if layout is not None else settings.cells
    links: list[Link] = []
    try:
        for number in range(count):
            links.append(await Link.connect(address, name="millrace-cli", cell_key=CellKeys(number).jobs))
        yield [Cell(link, number, settings) for number, link in enumerate(links)]
    finally:
        for link in links:
            await link.close()


async def run_nodes(settings: Settings, *, as_json: bool) -> int:
    async with opened_cells(settings) as cells:
        views = sorted([view for cell in cells for view in await cell.nodes()], key=lambda view: view.node)
    if as_json:
        _print_json(views)
    elif views:
        now_ms = int(time.time() * 1000)
        head = ["node", "state", "kind", "model", "running", "tokens/s", "failures", "last beat"]
        print(to_table(head, [node_row(view, now_ms) for view in views]))
    else:
        print("no node is registered")
    return 0


def node_row(view: NodeView, now_ms: int) -> list[str]:
    return [
        view.node,
        node_state(view, now_ms),
        view.kind,
        ",".join(view.models),
        f"{view.running}/{view.capacity}",
        f"{view.decode_rate:.0f}",
        f"{view.failed}/{view.ok + view.failed}",
        f"{max(now_ms - view.last_beat_ms, 0) / 1000:.0f} s ago",
    ]


def node_state(view: NodeView, now_ms: int) -> str:
    """active | inactive (no beat) | draining | bye | waiting (no lease, or left out after failures)"""
    if not view.alive:
        return "inactive"
    if view.state != "up":
        return view.state
    return "active" if view.usable(now_ms) else "waiting"


async def run_jobs(settings: Settings, job: str | None, *, as_json: bool) -> int:
    """One job with everything about it, or those that wait and run."""
    async with opened_cells(settings) as cells:
        if job is not None:
            record = await _record(cells, job)
            _print_json(record) if as_json else print(job_lines(record))
            return 0
        looks = [await cell.look(heads=LISTED_MAX) for cell in cells]
        running = [row for cell, look in zip(cells, looks, strict=True) for row in await _running(cell, look)]
    queues = [queue for look in looks for queue in look.queues if queue.length]
    if as_json:
        counts = {node.node: node.running for look in looks for node in look.nodes.values()}
        _print_json({"queues": queues, "running": counts, "jobs_running": [row[0] for row in running]})
        return 0
    rows = [*running, *(row for queue in queues for row in waiting_rows(queue))]
    print(to_table(["job", "state", "where"], rows) if rows else "no job waits or runs")
    return 0


async def _running(cell: Cell, look: CellView) -> list[list[str]]:
    """Jobs on nodes, by their reservations: at most LISTED_MAX a node."""
    rows = []
    for node in sorted(node.node for node in look.nodes.values() if node.running):
        for member in await cell.link.send("ZRANGE", cell.keys.node_running(node), 0, LISTED_MAX - 1):
            rows.append([member.decode("utf-8", "replace").partition("/")[0], "running", node])
    return rows


def waiting_rows(queue: QueueView) -> list[list[str]]:
    """The first ones in order, and how many more there are."""
    rows = [[head.job_id, "waiting", queue.queue] for head in queue.heads]
    more = queue.length - len(rows)
    return [*rows, [f"... {more} more", "waiting", queue.queue]] if more > 0 else rows


async def _record(cells: list[Cell], job: str) -> JobRecord:
    number = parse_cell(job, len(cells))
    record = await cells[number].job(JobId(job)) if number is not None else None
    if record is None:
        raise CannotStart(f"there is no job {job!r}: finished jobs are kept for a while only (MILLRACE_RESULT_TTL_MS)")
    return record


def job_lines(record: JobRecord) -> str:
    """One field a line; fields that say nothing yet are left out."""
    fields: dict[str, Any] = {**msgspec.to_builtins(record), "score": record.score.decode("utf-8", "replace")}
    shown = {name: value for name, value in fields.items() if value not in ("", 0, False, [], (), None)}
    width = max(len(name) for name in shown)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def _print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())
