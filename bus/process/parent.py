"""The small parent under which every role runs: it restarts a dead child and gives back what that child held.

    python -m gateway                     python -m gateway --child <fd>
    [parent] --starts, socket pair------> [child: all the work]
       |  <---- facts: owns, lease, ready ---  (bus.process.child)
       |-- child dies --> `down` for its nodes, its leases dropped, new child after a backoff
       |-- SIGTERM/SIGINT --> SIGTERM to the child, waits; a second one --> SIGKILL
       '-- dies itself --> end of file and SIGTERM at the child, which stops: nothing is orphaned

So a killed process costs its clients well under a second, where a lost machine costs one lease (design 3.4). The
parent imports neither torch nor aiohttp; what it needs for `down` it imports in the background once the child has
told it something to give back.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from bus.log import set_up_logging
from bus.process.exits import EXIT_CONFIG, EXIT_NAME_TAKEN, EXIT_OK
from bus.process.joined import joined_fleet
from bus.process.node_lock import NodeLock, take_node_lock
from bus.settings import PREFIX, Settings, SettingsError, read_settings

STABLE_S = 10.0  # a child that lived this long starts the backoff anew
BACKOFF_MAX_S = 10.0
RELEASE_MODULE = "bus.process.release"  # these two load the link and uvloop: a parent stays small without them
CHILD_MODULE = "bus.process.child"
CHILD_FLAG = "--child"
STOP_RELEASE_S = 2.0  # a parent that is told to stop gives a dead child's things back no longer than this
FLEET_LOOK_S = 0.2  # soon enough to drain while the fleet's server still stops
KILL_MARGIN_S = 5.0  # beyond the drain grace: for closing connections, before SIGKILL

log = logging.getLogger(__name__)


def _keep(settings: Settings, arguments: list[str]) -> Settings:
    argparse.ArgumentParser().parse_args(arguments)
    return settings


@dataclasses.dataclass(frozen=True)
class Role:
    """What `python -m <module>` is: the child's work, its own flags, and the name it must hold on this machine.

    child: "module:function" with the signature of `bus.process.child.ChildMain`, imported in the child only.
    configure: applies the role's command line flags to the settings (argparse: exits 2 by itself).
    names: candidates for a name that only one process here may have; the first free one becomes `node_id`. A child
        that ends with EXIT_NAME_TAKEN gets the next one.
    """

    module: str
    child: str
    configure: Callable[[Settings, list[str]], Settings] = _keep
    names: Callable[[Settings], Iterable[str]] | None = None


def run_role(role: Role, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """What a role's `__main__` does, parent or child. Returns the exit code.

    Usage: `sys.exit(run_role(Role("gateway", child="gateway.service:run"), sys.argv[1:], os.environ))`
    """
    own, line_fd = split_child_flag(arguments)
    set_up_logging(role.module)
    try:
        settings = role.configure(read_settings(environ), own)
    except SettingsError as error:
        log.error("cannot start: %s", error)
        return EXIT_CONFIG
    set_up_logging(role.module, level=settings.log_level, as_json=settings.log_json)
    if line_fd is not None:
        code: int = importlib.import_module(CHILD_MODULE).run_child(role.child, settings, line_fd)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # an engine's thread that is stuck must not keep a dead role alive
    lock, names = None, list(role.names(settings)) if role.names is not None else []
    if names:
        lock = take_node_lock(Path(settings.var_dir), names)
        if lock is None:
            log.error(
                "cannot start: the name %s is taken by a running process here: stop it, or set MILLRACE_NODE_ID",
                settings.node_id or role.module,
            )
            return EXIT_CONFIG
        settings = settings.changed(node_id=lock.name)
    return asyncio.run(Parent(role, settings, environ, lock, names).run())


def split_child_flag(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The role's own arguments, and the descriptor of the line if this process is a child."""
    own = list(arguments)
    if CHILD_FLAG not in own:
        return own, None
    at = own.index(CHILD_FLAG)
    line_fd = int(own[at + 1])
    return own[:at] + own[at + 2 :], line_fd


def restart_delay_s(crashes_in_row: int) -> float:
    """Almost at once after the first crash, then doubling: a crash loop must not eat the machine."""
    return min(0.05 * 2.0 ** min(crashes_in_row - 1, 20), BACKOFF_MAX_S)


def crashes_after(crashes_in_row: int, lived_s: float) -> int:
    return 1 if lived_s >= STABLE_S else crashes_in_row + 1


def fold_fact(facts: frozenset[str], line: str) -> frozenset[str]:
    """What must be given back when the child dies, after it told this line. "left" undoes "owns", "dropped" "lease"."""
    verb, _, rest = line.partition(" ")
    if verb == "left":
        return facts - {f"owns {rest}"}
    if verb == "dropped":
        return facts - {f"lease {rest}"}
    return facts | {line} if verb in ("owns", "lease") else facts


def describe_exit(code: int) -> str:
    """ "exit code 1", or "SIGKILL" for what the event loop reports as -9."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


class Parent:
    """Runs one child after another until told to stop, or until one says that a person must act (exit code 2)."""

    def __init__(
        self,
        role: Role,
        settings: Settings,
        environ: Mapping[str, str],
        lock: NodeLock | None,
        names: Sequence[str] = (),
    ) -> None:
        """names: the candidates among which `lock` was found."""
        self._role = role
        self._settings = settings
        self._given = environ
        self._others = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
        self._lock = lock
        self._names = names
        self._facts: frozenset[str] = frozenset()
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._warm: asyncio.Future[ModuleType] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        async with asyncio.TaskGroup() as releases:
            watching = releases.create_task(self._watch_fleet(), name="fleet")
            try:
                return await self._run_children(releases)
            finally:
                watching.cancel()

    async def _run_children(self, releases: asyncio.TaskGroup) -> int:
        """One after another. Returns the exit code."""
        crashes = 0
        self._release_left_behind(releases)
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run_child()
            lived_s = time.monotonic() - began
            held, self._facts = self._facts, frozenset()
            if held:
                releases.create_task(self._release(held), name="release")
            if self._stop.is_set():
                break
            if code == EXIT_CONFIG:
                return EXIT_CONFIG
            if code == EXIT_NAME_TAKEN:
                if not self._take_next_name():
                    return EXIT_CONFIG
                self._release_left_behind(releases)
                continue
            crashes = crashes_after(crashes, lived_s)
            delay_s = restart_delay_s(crashes)
            log.error(
                "child died, starting another",
                extra={**self._name(), "how": describe_exit(code), "lived_s": round(lived_s, 1), "delay_s": delay_s},
            )
            await self._pause(delay_s)
        return EXIT_OK

    async def _watch_fleet(self) -> None:
        """Stop when the fleet that this process joined has been stopped."""
        fleet = joined_fleet(self._settings, self._given)
        while fleet is not None:
            await asyncio.sleep(FLEET_LOOK_S)
            if not fleet.stands():
                log.warning("the fleet of %s has been stopped, so this process ends as well", fleet.path.parent)
                self._stop.set()
                return

    def _release_left_behind(self, releases: asyncio.TaskGroup) -> None:
        """The lock proves that the older process of this name is dead."""
        if self._lock is not None and self._lock.left_behind:
            releases.create_task(self._release(frozenset(self._lock.left_behind)), name="release of an older process")

    def _take_next_name(self) -> bool:
        """The first free candidate behind the one that a living process elsewhere has. False: there is none."""
        assert self._lock is not None, "only a role with names ends like that"
        rest = self._names[self._names.index(self._lock.name) + 1 :]
        taken = take_node_lock(Path(self._settings.var_dir), rest)
        if taken is None:
            log.error(
                "cannot start: the name %s is taken by a living process elsewhere: set MILLRACE_NODE_ID to another",
                self._lock.name,
            )
            return False
        log.info("taking the next name", extra={**self._name(), "next": taken.name})
        self._lock.release()
        self._lock = taken
        self._settings = self._settings.changed(node_id=taken.name)
        return True

    def _name(self) -> dict[str, str]:
        return (
            {"role": self._role.module, "node": self._settings.node_id} if self._lock else {"role": self._role.module}
        )

    def _on_signal(self) -> None:
        (self._kill if self._stop.is_set() else self._stop).set()

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stop.wait()

    async def _run_child(self) -> int:
        """Start a child, listen to its facts, wait for its end. Returns its exit code; negative is a signal."""
        ours, theirs = socket.socketpair()
        passed = (theirs.fileno(),) if self._lock is None else (theirs.fileno(), self._lock.fd)
        arguments = ["-m", self._role.module, CHILD_FLAG, str(theirs.fileno())]
        # Its own process group: Ctrl-C in a terminal reaches only the parent, which forwards it once.
        child = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=self._child_environ(), pass_fds=passed, process_group=0
        )
        theirs.close()
        log.info("child started", extra={**self._name(), "child_pid": child.pid})
        reader, writer = await asyncio.open_connection(sock=ours)
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen(reader), name="facts")
            forwarding = group.create_task(self._forward_stop(child), name="forward stop")
            code = await child.wait()
            forwarding.cancel()
            await asyncio.wait(
                [listening], timeout=0.05
            )  # what it told before its end; a grandchild may hold the line open
            listening.cancel()
        writer.close()
        return code

    def _child_environ(self) -> dict[str, str]:
        """Flags and the name are applied here; the child reads only its environment."""
        return {**self._others, **self._settings.to_env()}

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := (await reader.readline()).decode(errors="replace").strip():
            if line == "ready":
                log.info("ready", extra=self._name())
                continue
            self._facts = fold_fact(self._facts, line)
            if self._lock is not None:
                self._lock.remember(self._facts)
            self._warmed()

    async def _forward_stop(self, child: asyncio.subprocess.Process) -> None:
        await self._stop.wait()
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain_grace_ms / 1000 + KILL_MARGIN_S):
                    await self._kill.wait()
            child.kill()

    async def _release(self, facts: frozenset[str]) -> None:
        """Give back what a dead process held. Bounded by one lease: after that it has lapsed by itself."""
        limit_s = STOP_RELEASE_S if self._stop.is_set() else self._settings.lease_ms / 1000
        try:
            release = (await self._warmed()).release
            async with asyncio.timeout(limit_s):
                await release(self._settings, facts)
        except TimeoutError:
            log.warning("could not give back what the child held, its lease lapses", extra={"facts": sorted(facts)})
        except Exception:
            log.exception("giving back what the child held failed, its lease lapses", extra={"facts": sorted(facts)})

    def _warmed(self) -> asyncio.Future[ModuleType]:
        """Import in the background what `down` needs, before it is needed."""
        if self._warm is None:
            self._warm = asyncio.get_running_loop().run_in_executor(None, importlib.import_module, RELEASE_MODULE)
        return self._warm
