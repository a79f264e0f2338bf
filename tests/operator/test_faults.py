"""What goes wrong around `millrace up`: it ends when told, says why in one line, and leaves nothing behind."""

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millrace.keeper import shell
from millrace.lock import lock_path, running_pid
from millrace.logs import LogFile
from millrace.preflight import CannotStart, check_ports, merged_environ, read_procfile
from millrace.probe import is_ready
from tests.operator.fleet import GATEWAYS, ROOT, UpProcess, free_port, is_alive, wait_for

Start = Callable[..., UpProcess]
WITHOUT_EXEC = "loose: $PYTHON {toy} idle; true"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as endings:

        def make(*lines: str, folder: str = ".", **settings: str) -> UpProcess:
            fleet = UpProcess(tmp_path / folder, *lines, settings=settings)
            endings.callback(fleet.close)
            return fleet

        yield make


async def test_a_question_that_is_cancelled_is_over_whatever_it_was_about_to_say() -> None:
    """A cancel that meets the answer in the same turn of the loop must not be lost: `up` would never stop."""
    port = free_port()
    for turns in range(30):
        asked = asyncio.create_task(is_ready("127.0.0.1", port))
        for _ in range(turns):
            await asyncio.sleep(0)
        if asked.done():
            break
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked


@pytest.mark.parametrize("attempt", range(3))
def test_a_gateway_that_cannot_be_run_ends_the_start_each_time(start: Start, attempt: int) -> None:
    """It ends while `up` asks for its readiness, and both at once used to leave `up` waiting for ever."""
    fleet = start("gateway: exec /nonexistent/python", "worker: exec /nonexistent/python")

    assert fleet.wait_until_ended() == 1
    assert "ended with status 127" in fleet.output.strip().splitlines()[-1]


def test_what_a_line_without_exec_runs_ends_with_its_shell(start: Start) -> None:
    """The shell alone gets no further than its own end."""
    fleet = start(*GATEWAYS, WITHOUT_EXEC)
    fleet.wait_until_ready()
    pids = fleet.pids()

    fleet.process.send_signal(signal.SIGTERM)

    assert fleet.wait_until_ended() == 0
    assert not any(is_alive(pid) for pid in pids)
    assert "idle stopped" in fleet.output


def test_a_killed_up_leaves_nothing_of_a_line_without_exec(start: Start) -> None:
    fleet = start(*GATEWAYS, WITHOUT_EXEC)
    fleet.wait_until_ready()
    pids = fleet.pids()

    fleet.process.kill()
    fleet.wait_until_ended()

    wait_for(lambda: not any(is_alive(pid) for pid in pids), "no orphan")


def test_a_part_of_an_id_revokes_nothing_and_costs_no_key(start: Start) -> None:
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    path = fleet.folder / "var" / "api-key"
    [listed] = [line.split()[0] for line in fleet.command("keys", "list").stdout.splitlines()[1:]]

    refused = fleet.command("keys", "revoke", listed[:8])
    assert (refused.returncode, path.exists()) == (1, True)

    assert fleet.command("keys", "revoke", listed).returncode == 0
    assert not path.exists()


def test_what_cannot_be_kept_or_read_is_one_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / ".env").write_bytes(b"A=\xff\n")

    no_folder = start(*GATEWAYS, folder="one", MILLRACE_VAR_DIR=str(tmp_path / "taken"))
    assert no_folder.wait_until_ended() == 1
    assert "set MILLRACE_VAR_DIR to a folder of your own" in no_folder.output
    assert no_folder.output.count("\n") == 1
    with pytest.raises(CannotStart, match=r"\.env is not UTF-8"):
        merged_environ({}, tmp_path)


@pytest.mark.parametrize(
    ("ports", "host", "said"),
    [
        ({"gateway": 0}, "127.0.0.1", "MILLRACE_GATEWAY_PORT=0"),
        ({"gateway": 8080}, "no.such.host.invalid", "set MILLRACE_GATEWAY_HOST"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_named_with_its_setting(
    ports: dict[str, int], host: str, said: str
) -> None:
    with pytest.raises(CannotStart, match=said):
        check_ports(ports, host)


def test_a_killed_fleet_that_nobody_has_waited_for_does_not_run(tmp_path: Path) -> None:
    """Its warden holds the lock a little longer, and the next `up` waits for that instead of giving up."""
    dead = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    with lock_path(tmp_path).open("w") as file:
        file.write(f"{dead.pid}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)

        assert running_pid(tmp_path) == 0
    dead.wait()


def test_logs_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    """They quote what strangers sent."""
    log = LogFile(tmp_path / "log" / "role.log", size_max=20)
    for _ in range(3):
        log.write(b"a line of some length")
    log.close()

    for path in (tmp_path / "log").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["registry", "worker", "relay", "gateway2"])
def test_the_procfile_works_in_a_folder_whose_name_has_a_space(tmp_path: Path, name: str) -> None:
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    command = shell(read_procfile(ROOT / "Procfile")[name])
    done = subprocess.run(command, env={"PYTHON": str(python)}, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("-m ")
