"""The child of a worker's parent: one engine, one node, one process. What `python -m gpu_worker` runs.

Start: engine, then `own` (a new epoch), then the lease thread, then beats and reading. Stop, in this order: take no
more work, finish or hand back what is held, say bye, give the lease up, close. A relay is another service with the
same parts: gpu_worker.relay_engine.service.
"""

import asyncio
import importlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bus.cell import Cell
from bus.codec.events import NodeBye
from bus.codec.wire import HeldBy, Owned
from bus.ids import NodeId, cell_of_model, is_model_name, is_node_id
from bus.keys import CellKeys
from bus.link import Link, LinkError, ServerAddress
from bus.process.child import ParentLine, resolve
from bus.process.exits import NameTaken, StartError
from bus.process.startup import prepare_server
from bus.settings import Settings
from gpu_worker.beats import Beater, make_beat
from gpu_worker.echo_engine import EchoEngine
from gpu_worker.echo_script import EchoKnobs
from gpu_worker.engine import Engine, EngineInfo, EngineStartError
from gpu_worker.lease import LeaseThread
from gpu_worker.loop_lag import LoopLag
from gpu_worker.names import is_default_name
from gpu_worker.reader import NodeReader
from gpu_worker.service import NodeService

RELAY = "gpu_worker.relay_engine.service:run"
TORCH = "gpu_worker.torch_factory:make_torch_engine"  # imports torch
OWN_PATIENCE = 3  # leases to wait for an older holder's to lapse
CLOSE_S = 3.0

log = logging.getLogger(__name__)


async def run(settings: Settings, parent: ParentLine) -> None:
    """See bus.process.child.ChildMain."""
    if not is_node_id(settings.node_id):
        raise StartError(f"MILLRACE_NODE_ID={settings.node_id!r} is no node id: 1 to 64 of A-Z a-z 0-9 _ . -")
    if settings.engine == "relay":
        await resolve(RELAY)(settings, parent)
        return
    address = await prepare_server(settings)
    if is_default_name(settings):
        await leave_taken_name(settings, address, parent.stop)
    started = await start_unless_stopped(settings, parent.stop)
    if started is None:
        return
    engine, info = started
    try:
        await serve(settings, parent, address, engine, info)
    finally:
        await close_engine(engine)


async def start_unless_stopped(settings: Settings, stop: asyncio.Event) -> tuple[Engine, EngineInfo] | None:
    """Loading a model takes seconds; None if told to stop meanwhile. Raises StartError with what to do."""
    starting = asyncio.create_task(start_engine(settings), name="engine start")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        return starting.result() if starting.done() else None
    finally:
        starting.cancel()
        stopping.cancel()


async def start_engine(settings: Settings) -> tuple[Engine, EngineInfo]:
    try:
        engine = make_echo_engine(settings) if settings.engine == "echo" else await make_torch_engine(settings)
        return engine, await engine.start()
    except EngineStartError as error:
        raise StartError(str(error)) from error


def make_echo_engine(settings: Settings) -> Engine:
    names = [name.strip() for name in settings.echo_models.split(",") if name.strip()]
    if not names or not all(is_model_name(name) for name in names):
        raise EngineStartError(f"MILLRACE_ECHO_MODELS={settings.echo_models!r} is no comma list of model names")
    knobs = EchoKnobs(
        delay_ms=settings.echo_delay_ms,
        first_ms=settings.echo_first_ms,
        fail_at=settings.echo_fail_at,
        poison=settings.echo_poison,
    )
    return EchoEngine(models=names, capacity=settings.capacity, knobs=knobs)


async def make_torch_engine(settings: Settings) -> Engine:
    """In a thread: importing torch and converting a model each take seconds."""
    module, _, function = TORCH.partition(":")
    imported = await asyncio.to_thread(importlib.import_module, module)
    engine: Engine = await asyncio.to_thread(getattr(imported, function), settings)
    return engine


async def close_engine(engine: Engine) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await engine.close()
    except TimeoutError:
        log.warning("the engine does not close, the process ends without it")


def choose_cell(models: tuple[str, ...], cells: int) -> int:
    """A model lives in one cell with all its nodes. Raises StartError for models of several cells."""
    found = {cell_of_model(model, cells) for model in models}
    if len(found) != 1:
        raise StartError(f"the models {', '.join(models)} live in different cells: run a worker for each")
    return found.pop()


async def own_node(cell: Cell, node: NodeId, stop: asyncio.Event, *, may_move: bool = False) -> Owned | None:
    """Take the node; waits for an older holder's lease to lapse. None if told to stop meanwhile.

    may_move: another name would do; raises NameTaken as soon as the older holder is seen to live.
    """
    patience_s = OWN_PATIENCE * cell.settings.lease_ms / 1000
    end_s = asyncio.get_running_loop().time() + patience_s
    before: HeldBy | None = None
    while not stop.is_set():
        answer = await cell.own(node, node)
        if isinstance(answer, Owned):
            return answer
        if may_move and is_alive(before, answer):
            raise NameTaken(_taken(node, answer))
        before = answer
        if asyncio.get_running_loop().time() > end_s:
            raise StartError(_taken(node, answer))
        log.info("node is held by another, waiting", extra={"node": node, "holder": answer.holder})
        await asyncio.sleep(cell.settings.lease_ms / 10_000)
    return None


def is_alive(before: HeldBy | None, now: HeldBy) -> bool:
    """A holder that renewed its lease between two looks, or that needs none: a registration over HTTP."""
    renewed = before is not None and before.holder == now.holder and before.expires_ms < now.expires_ms
    return renewed or not now.expires_ms


async def leave_taken_name(settings: Settings, address: ServerAddress, stop: asyncio.Event) -> None:
    """Find out before the engine loads its model; `own` checks again. Raises NameTaken.

    A lease that only lapses is an older process of this name that died: its node will be ours.
    """
    node = NodeId(settings.node_id)
    model = settings.echo_models.partition(",")[0].strip() if settings.engine == "echo" else settings.model
    before: HeldBy | None = None
    async with connected_cell(settings, address, cell_of_model(model, settings.cells), node) as cell:
        while not stop.is_set():
            view = await cell.node(node)
            if view is None or not view.leased:
                return
            expiry = await cell.link.send("ZSCORE", cell.keys.leases, view.owner)
            holder = HeldBy(node, view.owner, int(float(expiry or 0)) or 1)
            if is_alive(before, holder):
                raise NameTaken(_taken(node, holder))
            before = holder
            await asyncio.sleep(settings.lease_ms / 20_000)


def _taken(node: NodeId, answer: HeldBy) -> str:
    return f"the node id {node} is served by a living worker ({answer.holder}): set MILLRACE_NODE_ID to another"


@asynccontextmanager
async def connected_cell(settings: Settings, address: ServerAddress, number: int, name: str) -> AsyncIterator[Cell]:
    """A cell over a link of its own."""
    link = await Link.connect(
        address,
        name=name,
        cell_key=CellKeys(number).leases,
        connect_timeout_s=settings.connect_timeout_ms / 1000,
        wait_s=settings.send_wait_ms / 1000,
    )
    async with link:
        yield Cell(link, number, settings)


async def serve(
    settings: Settings, parent: ParentLine, address: ServerAddress, engine: Engine, info: EngineInfo
) -> None:
    node = NodeId(settings.node_id)
    number = choose_cell(info.models, settings.cells)
    async with connected_cell(settings, address, number, node) as cell:
        owned = await own_node(cell, node, parent.stop, may_move=is_default_name(settings))
        if owned is None:
            return
        parent.owns(number, node, owned.holder)
        lease = LeaseThread(address, settings, cells=[number], name=node)
        try:
            await lease.start()
            await _serve_owned(settings, parent, address, cell, engine, info, owned, lease)
        finally:
            await lease.close()
        await _give_up(cell, owned)
        parent.left(number, node, owned.holder)


async def _serve_owned(
    settings: Settings,
    parent: ParentLine,
    address: ServerAddress,
    cell: Cell,
    engine: Engine,
    info: EngineInfo,
    owned: Owned,
    lease: LeaseThread,
) -> None:
    reader = NodeReader(cell, address, owned.holder, block_ms=settings.block_ms, name=owned.node)
    service = NodeService(
        cell,
        owned.node,
        owned.holder,
        engine,
        settings,
        reader=reader,
        lease=lease,
        since_ms=owned.epoch,
        resumes=bool(info.resume_digest),
        context_length=info.context_length,
    )
    version, lag = package_version(), LoopLag()
    beater = Beater(
        cell,
        owned.node,
        lambda: make_beat(owned, info, engine.load(), draining=service.draining.is_set(), version=version, lag=lag),
        settings.beat_ms / 1000,
    )
    cell.link.on_reconnect(service.on_reconnect)
    cell.link.on_reconnect(beater.nudge)

    async def say_bye() -> None:
        beating.cancel()
        try:
            await cell.publish_node_event(NodeBye(owned.node, owned.epoch))
        except LinkError as error:
            log.warning("bye not said", extra={"node": owned.node, "error": str(error)})

    async with asyncio.TaskGroup() as group:
        beating = group.create_task(beater.run(), name="beats")
        reading = group.create_task(reader.run(), name="reads")
        measuring = group.create_task(lag.run(), name="loop lag")
        log.info("node is up", extra={"node": owned.node, "epoch": owned.epoch, "models": ",".join(info.models)})
        parent.ready()
        await service.run(parent.stop, say_bye)
        for task in (beating, reading, measuring):
            task.cancel()


def package_version() -> str:
    try:
        return importlib.metadata.version("millrace")
    except importlib.metadata.PackageNotFoundError:
        return "source"


async def _give_up(cell: Cell, owned: Owned) -> None:
    """The lease goes, and with it whatever was assigned at the last moment."""
    try:
        left = await cell.down(owned.node, owned.holder)
        log.info("node has left", extra={"node": owned.node, "handed_back": len(left)})
    except LinkError as error:
        log.warning("node not given up, its lease lapses", extra={"node": owned.node, "error": str(error)})
