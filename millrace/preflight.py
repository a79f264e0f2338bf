"""What can be known to be wrong before anything is started; each problem is one line that says what to do."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from honcho.environ import parse as parse_env_file
from honcho.environ import parse_procfile

from bus.settings import Settings
from millrace.embedded import is_free


class CannotStart(Exception):
    """The fleet cannot start until a person acts; the message is one line that says what to do."""


def merged_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment over the folder's `.env`, as honcho reads it."""
    try:
        text = (folder / ".env").read_text(encoding="utf-8")
    except OSError:
        return dict(environ)
    except UnicodeDecodeError as error:
        raise CannotStart(f"{folder / '.env'} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return {**parse_env_file(text), **environ}


def read_procfile(path: Path) -> dict[str, str]:
    """Name and command of each line, in order."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise CannotStart(
            f"there is no {path}: run this in the folder of Millrace, or name one with --procfile"
        ) from None
    except UnicodeDecodeError as error:
        raise CannotStart(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines: dict[str, str] = dict(parse_procfile(text).processes)
    if not lines:
        raise CannotStart(f"{path} has no line of the form `name: command`")
    return lines


def gateway_ports(lines: Mapping[str, str], settings: Settings) -> dict[str, int]:
    """The ports of the gateways among these lines, by name."""
    ports = {"gateway": settings.gateway_port, "gateway2": settings.gateway2_port}
    return {name: port for name, port in ports.items() if name in lines}


def check_ports(ports: Mapping[str, int], host: str) -> None:
    if len(set(ports.values())) < len(ports):
        raise CannotStart(
            "both gateways have the same port: set MILLRACE_GATEWAY_PORT or MILLRACE_GATEWAY2_PORT to another"
        )
    for name, port in ports.items():
        setting = "MILLRACE_GATEWAY_PORT" if name == "gateway" else "MILLRACE_GATEWAY2_PORT"
        if port == 0:
            raise CannotStart(f"{setting}=0 is for a gateway alone, whose log says its port: set it to a free port")
        try:
            free = is_free(host, port)
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {host} port {port} ({error.strerror}): set MILLRACE_GATEWAY_HOST or {setting}"
            ) from error
        if not free:
            raise CannotStart(
                f"port {port} on {host} is taken: stop what listens there, or set {setting} to a free port"
            )


def fetch_model(settings: Settings, environ: Mapping[str, str], folder: Path) -> None:
    """Have the worker's own part fetch the model if it is missing, with its progress on this terminal.

    Without a network it is a matter of a moment once the model is there. Raises CannotStart; the reason is printed.
    """
    command = [sys.executable, "-m", "gpu_worker.model_files", "fetch"]
    done = subprocess.run(command, cwd=folder, env=dict(environ), stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise CannotStart(f"there is no model {settings.model} to serve; the line above says why")


def runs_torch(settings: Settings, lines: Mapping[str, str]) -> bool:
    """Whether one of these lines is a torch worker."""
    return settings.engine == "torch" and any(
        "-m gpu_worker" in command and "--engine" not in command for command in lines.values()
    )
