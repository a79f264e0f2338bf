"""`millrace up`: one machine's whole fleet, from the server up to the gateways, until Ctrl-C.

    1 lock       one fleet per var folder (millrace.lock)
    2 preflight  settings, Procfile, ports, model: wrong ones are reported before anything starts
    3 warden     ends what we started if we are killed (millrace.warden)
    4 server     the embedded one, or REDIS_URL's; checked for version and eviction policy
    5 key        var/api-key is made, or registered again
    6 roles      the lines of the Procfile, each kept running (millrace.keeper)
    7 ready      /ready of every gateway answers 200 and the Procfile's own workers are up; then the banner
    stop         the other way round: the roles together, then the server

Signals: the first SIGINT, SIGTERM or SIGHUP stops in order, the second one kills the roles.
"""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bus.link import AddressError, LinkError, ServerAddress, ServerUnfit, check_server, find_warning
from bus.settings import SERVER_URL_FILE, Settings
from millrace import local_key
from millrace.banner import banner
from millrace.embedded import Embedded, EmbeddedError, write_private
from millrace.keeper import Ended, Keeper, Spec, shell
from millrace.lock import FleetLock, lock_path, running_pid, take_lock, wait_until_free
from millrace.logs import LogFile, Terminal
from millrace.own_workers import OwnWorkers
from millrace.preflight import CannotStart, check_ports, fetch_model, gateway_ports, read_procfile, runs_torch
from millrace.probe import is_ready

WARDEN_SCRIPT = Path(__file__).with_name("warden.py")
OLD_FLEET_WAIT_S = 40.0  # a killed fleet's warden may still be ending its roles
READY_POLL_S = 0.25
STILL_WAITING_S = 20.0
STOP_MARGIN_S = 8.0
SERVER_STOP_S = 20.0


async def run_up(settings: Settings, environ: Mapping[str, str], folder: Path, procfile: Path) -> int:
    """Run the fleet until a signal. Returns the exit code; raises CannotStart with what a person should do."""
    lines = read_procfile(procfile)
    lock = _lock(Path(settings.var_dir))
    try:
        check_ports(gateway_ports(lines, settings), settings.gateway_host)
        if runs_torch(settings, lines):
            fetch_model(settings, environ, folder)
        fleet = Fleet(settings, environ, folder, lines, lock)
        return await fleet.run()
    finally:
        lock.release()


def _lock(var_dir: Path) -> FleetLock:
    """The fleet's lock. A fleet whose `millrace up` was killed is waited for: its warden is ending it."""
    try:
        var_dir.mkdir(parents=True, exist_ok=True)
        lock = take_lock(var_dir)
    except OSError as error:
        raise CannotStart(
            f"cannot keep files in {var_dir} ({error.strerror}): set MILLRACE_VAR_DIR to a folder of your own"
        ) from error
    if lock is None and running_pid(var_dir) == 0:
        print("waiting for the rest of a killed fleet to end ...", flush=True)
        wait_until_free(var_dir, OLD_FLEET_WAIT_S)
        lock = take_lock(var_dir)
    if lock is None:
        raise CannotStart(f"a fleet runs from {var_dir} already ({lock_path(var_dir)}): `make stop` ends it")
    return lock


class Fleet:
    """The processes of one `millrace up`, in the order of the module's docstring."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], folder: Path, lines: Mapping[str, str], lock: FleetLock
    ) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._folder = folder
        self._lines = lines
        self._lock = lock
        self._var_dir = Path(settings.var_dir)
        self._terminal = Terminal(width=max(len(name) for name in lines))
        self._roles: list[Keeper] = []
        self._server: Keeper | None = None
        self._warden: asyncio.subprocess.Process | None = None
        self._force = asyncio.Event()
        self._ready = False
        self._stopping = False
        self._ending = False  # `_stop` runs; a cancel would break it off
        self._problem: str | None = None  # why the start was given up
        self._serving: asyncio.Task[None] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # `nohup make run`: meant to outlive its terminal
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as keepers:
                self._serving = keepers.create_task(self._serve(keepers), name="serve")
        except* (CannotStart, EmbeddedError, LinkError) as errors:
            self._problem = str(errors.exceptions[0])
        finally:
            self._terminal.close()
        if self._problem is not None:
            raise CannotStart(self._problem)
        return 0

    async def _serve(self, keepers: asyncio.TaskGroup) -> None:
        """Start all, announce it, wait for the stop; whatever happens, stop all in order."""
        try:
            await self._start_warden()
            url = await self._start_server(keepers)
            key = await self._register_key(url)
            workers = OwnWorkers(self._settings.changed(redis_url=url), self._lines)
            self._start_roles(keepers, url)
            began = time.monotonic()
            await self._wait_until_ready(workers)
            if self._stopping:
                return
            self._ready = True
            for line in banner(self._settings, gateway_ports(self._lines, self._settings), key, url):
                self._terminal.line(line)
            self._terminal.line(f"ready in {time.monotonic() - began:.1f} s; Ctrl-C stops everything")
            await local_key.keep_key_known(ServerAddress.parse(url), self._var_dir)
        finally:
            await self._stop()

    def _on_signal(self) -> None:
        if self._stopping:
            self._terminal.line("stopping now, without waiting for running answers")
            self._force.set()
            if not self._ending and self._serving is not None:
                self._serving.cancel()
            return
        self._terminal.line("stopping; press Ctrl-C again to stop at once")
        self._give_up(None)

    def _give_up(self, problem: str | None) -> None:
        """Leave `_serve` wherever it is; its `finally` stops what runs."""
        if self._stopping:
            return
        self._stopping = True
        self._problem = problem
        if self._serving is not None:
            self._serving.cancel()

    async def _start_warden(self) -> None:
        """In a session of its own, with the fleet's lock and the reading end of a pipe that closes when we die."""
        self._warden = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(WARDEN_SCRIPT), str(self._var_dir / SERVER_URL_FILE)),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
            pass_fds=(self._lock.fd,),
        )

    def _tell_warden(self, line: str) -> None:
        if self._warden is not None and self._warden.stdin is not None:
            with contextlib.suppress(OSError):
                self._warden.stdin.write(f"{line}\n".encode())

    async def _start_server(self, keepers: asyncio.TaskGroup) -> str:
        """The address of a server that is fit to be used. Raises CannotStart."""
        if self._settings.redis_url:
            try:
                address = ServerAddress.parse(self._settings.redis_url)
                await check_server(address)
            except (AddressError, ServerUnfit) as error:
                raise CannotStart(str(error)) from error
            if warning := find_warning(address):
                self._terminal.line(f"warning: {warning}")
            url = self._settings.redis_url
        else:
            embedded = Embedded(self._var_dir)
            spec = embedded.prepare()
            self._server = self._keeper(spec, "server", on_pid=embedded.remember_pid)
            keepers.create_task(self._server.run(), name="keep server")
            await embedded.wait_until_ready()
            url = embedded.url
        write_private(self._var_dir / SERVER_URL_FILE, url + "\n")
        return url

    async def _register_key(self, url: str) -> str:
        key = local_key.made_key(self._var_dir)
        await local_key.register_key(ServerAddress.parse(url), self._var_dir)
        return key

    def _start_roles(self, keepers: asyncio.TaskGroup, url: str) -> None:
        self._environ |= {"REDIS_URL": url, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
        for name, command in self._lines.items():
            keeper = self._keeper(Spec(name, shell(command)), "+")
            self._roles.append(keeper)
            keepers.create_task(keeper.run(), name=f"keep {name}")

    def _keeper(self, spec: Spec, word: str, on_pid: Callable[[int], None] | None = None) -> Keeper:
        log_file = LogFile(self._var_dir / "log" / f"{spec.name}.log", self._settings.log_file_max)

        def on_start(pid: int) -> None:
            self._tell_warden(f"{word} {pid}")
            if on_pid is not None:
                on_pid(pid)

        def on_end(pid: int, ended: Ended) -> bool:
            self._tell_warden(f"- {pid}")
            return self._judge_end(ended, log_file.path)

        return Keeper(
            spec,
            environ=self._environ,
            folder=self._folder,
            terminal=self._terminal,
            log_file=log_file,
            on_start=on_start,
            on_end=on_end,
        )

    def _judge_end(self, ended: Ended, log_path: Path) -> bool:
        """Whether to start the process again. Before the fleet was ready, what needs a person ends the start."""
        if self._stopping:
            return False
        if not self._ready and (ended.needs_person or (ended.name == "server" and ended.lived_s < 5)):
            self._give_up(
                f"{ended.name} ended with {ended.how}: {ended.last_line or 'it said nothing'} (see {log_path})"
            )
            return False
        self._terminal.line(f"{ended.name} ended with {ended.how}, starting it again (see {log_path})")
        return True

    async def _wait_until_ready(self, workers: OwnWorkers) -> None:
        """Gateways first, then our own workers. Says from time to time what is missing; the roles log why."""
        ports = gateway_ports(self._lines, self._settings)
        said = time.monotonic()
        while not self._stopping:
            answers = {name: await is_ready(self._settings.gateway_host, port) for name, port in ports.items()}
            missing = {name: why for name, why in answers.items() if why} or await workers.missing()
            if not missing:
                return
            if time.monotonic() - said > STILL_WAITING_S:
                said = time.monotonic()
                for name, why in missing.items():
                    self._terminal.line(f"still waiting for {name}: {why} (logs: {self._var_dir / 'log'})")
            await asyncio.sleep(READY_POLL_S)

    async def _stop(self) -> None:
        """Roles together, then the server; each bounded. Runs also when the start failed half-way."""
        self._stopping = self._ending = True
        with contextlib.suppress(OSError):  # first: workers that joined us drain while the server is still there
            (self._var_dir / SERVER_URL_FILE).unlink()
        grace_s = self._settings.drain_grace_ms / 1000 + STOP_MARGIN_S
        async with asyncio.TaskGroup() as stops:
            for role in self._roles:
                stops.create_task(role.stop(grace_s, self._force))
        if self._server is not None:
            await self._server.stop(SERVER_STOP_S, asyncio.Event())
        self._tell_warden("bye")
        if self._warden is not None and self._warden.stdin is not None:
            self._warden.stdin.close()
            await self._warden.wait()
