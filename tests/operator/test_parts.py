"""The small parts under `millrace up`: pauses, log files, lock, Procfile, the installer's advice."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bus.settings import Settings
from millrace.banner import banner
from millrace.keeper import Ended, count_end, pause_s
from millrace.lock import running_pid, take_lock
from millrace.logs import LogFile, Terminal
from millrace.preflight import CannotStart, check_ports, gateway_ports, merged_environ, read_procfile
from millrace.table import to_table

ROOT = Path(__file__).resolve().parents[2]


def test_a_crash_loop_is_slowed_down_and_a_single_crash_is_not() -> None:
    assert [pause_s(ends) for ends in (1, 2, 3, 4, 10)] == [0.1, 1.0, 2.0, 4.0, 30.0]
    assert count_end(5, lived_s=31) == 1
    assert count_end(5, lived_s=3) == 6


def test_an_end_is_described_in_words_a_person_knows() -> None:
    assert Ended("worker", -9, 1.0, "").how == "SIGKILL"
    assert Ended("worker", 1, 1.0, "").how == "status 1"


@pytest.mark.parametrize(("code", "needs_person"), [(2, True), (127, True), (1, False), (-9, False), (0, False)])
def test_only_what_a_person_must_change_ends_a_start(code: int, needs_person: bool) -> None:
    assert Ended("worker", code, 1.0, "").needs_person is needs_person


def test_a_log_file_is_bounded_and_keeps_one_older_file(tmp_path: Path) -> None:
    """No unbounded file: two times the setting is the most a role may take."""
    log = LogFile(tmp_path / "role.log", size_max=100)
    for number in range(50):
        log.write(f"line {number}".encode())
    log.close()

    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["role.log", "role.log.1"]
    assert all(file.stat().st_size <= 100 for file in files)
    assert files[0].read_bytes().endswith(b"line 49\n")


def test_a_stopped_terminal_does_not_stop_the_fleet() -> None:
    """Ctrl-S in the terminal must not make the roles wait: lines are dropped and counted."""

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.2)
            return super().write(text)

    terminal = Terminal(Stopped())
    began = time.monotonic()
    for number in range(30_000):
        terminal.role_line("worker", str(number))

    assert time.monotonic() - began < 5


def test_the_lock_tells_whose_fleet_runs(tmp_path: Path) -> None:
    assert running_pid(tmp_path) is None
    lock = take_lock(tmp_path)
    assert lock is not None

    assert running_pid(tmp_path) == os.getpid()
    assert take_lock(tmp_path) is None

    lock.release()
    assert running_pid(tmp_path) is None


def test_the_environment_stands_over_the_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# comment\nMILLRACE_CELLS=3\nREDIS_URL=redis://file/0\n")

    merged = merged_environ({"MILLRACE_CELLS": "1"}, tmp_path)

    assert merged == {"MILLRACE_CELLS": "1", "REDIS_URL": "redis://file/0"}


def test_a_missing_or_empty_procfile_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="run this in the folder of Millrace"):
        read_procfile(tmp_path / "Procfile")
    (tmp_path / "Procfile").write_text("# nothing\n")
    with pytest.raises(CannotStart, match="has no line"):
        read_procfile(tmp_path / "Procfile")


def test_the_procfile_has_the_roles_of_a_whole_fleet() -> None:
    lines = read_procfile(ROOT / "Procfile")

    assert list(lines) == ["registry", "dispatcher", "worker", "relay", "gateway", "gateway2"]
    assert gateway_ports(lines, Settings()) == {"gateway": 8080, "gateway2": 8081}


def test_two_gateways_cannot_share_a_port() -> None:
    with pytest.raises(CannotStart, match="both gateways have the same port"):
        check_ports({"gateway": 1234, "gateway2": 1234}, "127.0.0.1")


def test_what_the_banner_prints_can_be_pasted() -> None:
    """The curl line is handed to a shell as it stands; here it only prints its arguments."""
    lines = banner(Settings(), {"gateway": 8080, "gateway2": 8081}, "mr_key", "redis://default:pw@127.0.0.1:1/0")
    at = next(number for number, line in enumerate(lines) if line.strip().startswith("curl"))
    pasted = "\n".join(lines[at:]).replace("curl ", "printf '%s\\n' ", 1)

    said = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout.splitlines()

    assert said[0] == "http://127.0.0.1:8080/v1/chat/completions"
    assert "Authorization: Bearer mr_key" in said
    assert json.loads(said[-1])["messages"][0]["role"] == "user"


def test_a_role_may_hold_more_connections_than_a_shell_allows() -> None:
    """Many systems start with 1024 open files, which is 1024 waiting clients."""
    code = "import resource; from bus.process.child import allow_many_connections as allow; allow(); "
    code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256)"

    done = subprocess.run(
        ["sh", "-c", 'ulimit -S -n 256; exec "$0" -c "$1"', sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.stdout.strip() == "True", done.stderr


def test_a_table_shows_foreign_text_without_obeying_it() -> None:
    """Node names and users come from strangers; an escape sequence must not reach the terminal."""
    lines = to_table(["node", "kind"], [["a\x1b[2J", "torch"], ["b", ""]]).splitlines()

    assert lines == ["node      kind", "a\\x1b[2J  torch", "b         -"]


def installer() -> ModuleType:
    """requirements/install.py is a script of its own: it runs before anything is installed."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0", "README.md lists what is supported"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "check your package index"),
        ("Max retries exceeded with url", "is there a network?"),
    ],
)
def test_a_failed_installation_says_what_to_do(said: str, advice: str) -> None:
    assert advice in installer().hint(said)


def test_the_locks_name_exact_versions_with_hashes_and_no_cuda() -> None:
    """torch is pinned on its own: its wheels differ by machine."""
    for kind in ("service", "worker", "dev"):
        lock = (ROOT / "requirements" / f"{kind}.lock").read_text()
        names = [line.split("==")[0] for line in lock.splitlines() if "==" in line]
        assert len(names) > 15
        assert lock.count("--hash=sha256:") >= len(names)
        assert not [name for name in names if name == "torch" or name.startswith("nvidia")]
    assert (ROOT / "requirements" / "torch.in").read_text().strip() == "torch==2.13.0"


def test_the_command_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "millrace", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )

    for command in ("up", "stop", "worker", "keys", "nodes", "jobs"):
        assert f"\n    {command} " in done.stdout
