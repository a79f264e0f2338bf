"""The child side of a role: what its parent is told, when it must stop, and how it ends.

A role's work runs in a child of a small restarting parent (`bus.process.parent`). The two share one socket pair:

    child -> parent   one fact a line: "owns <cell> <node> <holder>", "left ...", "lease <cell> <holder>", "ready"
    parent -> child   nothing; end of file means that the parent is gone, so the child must stop

The facts say what has to be given back when the child dies: reservations of its nodes, leases of its holders.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from bus.codec.wire import Superseded
from bus.ids import Holder, NodeId
from bus.link import LinkError
from bus.process.exits import (
    EXIT_CONFIG,
    EXIT_CRASH,
    EXIT_NAME_TAKEN,
    EXIT_OK,
    EXIT_SUPERSEDED,
    EXIT_UNAVAILABLE,
    NameTaken,
    StartError,
    leaves,
)
from bus.settings import Settings

ORPHAN_GRACE_S = 8.0  # how long a child without its parent may take to hand its work back
OPEN_FILES = 65_536
PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class ParentLine:
    """The child's end of the line to its parent. Facts may be told from any thread.

    `stop` is set by SIGTERM, SIGINT or the parent's death; a role then takes no more work, finishes or hands
    back what it holds, and returns.
    """

    def __init__(self, line: socket.socket | None = None) -> None:
        self.stop = asyncio.Event()
        self._line = line

    def owns(self, cell: int, node: NodeId, holder: Holder) -> None:
        """From now on a death of this process must call `down` for the node."""
        self._tell(f"owns {cell} {node} {holder}")

    def left(self, cell: int, node: NodeId, holder: Holder) -> None:
        """The node was given up in good order; nothing to do for it any more."""
        self._tell(f"left {cell} {node} {holder}")

    def lease(self, cell: int, holder: Holder) -> None:
        """From now on a death of this process must drop this lease."""
        self._tell(f"lease {cell} {holder}")

    def dropped(self, cell: int, holder: Holder) -> None:
        """The lease was dropped in good order."""
        self._tell(f"dropped {cell} {holder}")

    def ready(self) -> None:
        self._tell("ready")

    def _tell(self, fact: str) -> None:
        if self._line is None:
            return
        with contextlib.suppress(OSError):  # a parent that is gone is noticed by its end of file
            self._line.sendall(f"{fact}\n".encode())


ChildMain = Callable[[Settings, ParentLine], Coroutine[Any, Any, None]]


def run_child(target: str, settings: Settings, line_fd: int) -> int:
    """Run `module:function` of a role until it returns or fails. Returns the exit code; the reason is logged."""
    line = socket.socket(fileno=line_fd)
    line.set_inheritable(False)
    die_with_parent()
    allow_many_connections()
    faulthandler.enable()
    try:
        uvloop.run(_supervise(resolve(target), settings, line))
    except Exception as error:  # noqa: BLE001 - the last stop: whatever it is becomes a log line and an exit code
        return report(error)
    return EXIT_OK


def report(error: Exception) -> int:
    """Log why the child ends, in one line where a person can act on it. Returns the exit code."""
    found = leaves(error)
    for leaf in found:
        if isinstance(leaf, StartError):
            log.error("cannot start: %s", leaf)
            return EXIT_CONFIG
    for leaf in found:
        if isinstance(leaf, NameTaken):
            log.warning("the name is taken", extra={"reason": str(leaf)})
            return EXIT_NAME_TAKEN
    if any(isinstance(leaf, Superseded) for leaf in found):
        log.warning("superseded by another owner, dropped everything", extra={"reason": str(found[0])})
        return EXIT_SUPERSEDED
    if all(isinstance(leaf, LinkError) for leaf in found):
        log.error("lost the server", extra={"error": str(found[0])})
        return EXIT_UNAVAILABLE
    log.critical("crashed", exc_info=error)
    return EXIT_CRASH


def resolve(target: str) -> ChildMain:
    """Import a role's work only in the child: the parent stays small."""
    module, _, function = target.partition(":")
    found: ChildMain = getattr(importlib.import_module(module), function)
    return found


def allow_many_connections() -> None:
    """Raise the soft limit of open files, often 1024, to what the system allows: each waiting client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # a system with a lower limit of its own: we keep what we have
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM at the parent's death: covers the time before the watching thread runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def _supervise(child_main: ChildMain, settings: Settings, line: socket.socket) -> None:
    parent = ParentLine(line)
    loop = asyncio.get_running_loop()
    orphaned = threading.Event()

    def on_signal(number: int) -> None:
        if orphaned.is_set():
            return  # the kernel's word of the parent's death: already stopping, and the watcher sets the limit
        if parent.stop.is_set():
            log.warning("stopping at once", extra={"signal": signal.Signals(number).name})
            os._exit(128 + number)
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        parent.stop.set()

    def on_orphaned() -> None:
        log.warning("the parent is gone, stopping")
        parent.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    watched = (line, loop, orphaned, on_orphaned)
    threading.Thread(target=_watch_parent, args=watched, name="parent watch", daemon=True).start()
    await child_main(settings, parent)


def _watch_parent(
    line: socket.socket,
    loop: asyncio.AbstractEventLoop,
    orphaned: threading.Event,
    on_orphaned: Callable[[], None],
) -> None:
    """Wait for the end of file; then stop in good order, and if that takes too long (a stuck loop), at once."""
    with contextlib.suppress(OSError):
        while line.recv(64):
            pass
    orphaned.set()
    with contextlib.suppress(RuntimeError):  # the loop is closed already: we are ending anyway
        loop.call_soon_threadsafe(on_orphaned)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(EXIT_CRASH)
