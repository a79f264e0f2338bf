"""Closed-loop no-op jobs, result awaited: Millrace beside arq, taskiq-redis and celery in one run.

    .venv/bin/python -m benchmarks.bus                          all four, at 1, 32 and 256 in flight
    .venv/bin/python -m benchmarks.bus --only millrace --seconds 10 --json var/bench/bus.json

Client and worker are processes of their own, each contender has the same server binary, started fresh on a free port,
and a venv of its own (under var/bench/, pinned below, made on the first run). See benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.servers import ValkeyServer

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
BENCH_DIR = ROOT / "var" / "bench"
LEVELS = (1, 32, 256)
READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Contender:
    """Commands start with a program of the contender's venv."""

    name: str
    workers: Sequence[Sequence[str]]
    client: Sequence[str]
    packages: Sequence[str] = ()  # none: this project's own venv
    environ: dict[str, str] = field(default_factory=dict)


CONTENDERS = (
    Contender(
        "millrace",
        workers=(
            ("python", "-m", "registry_consumer"),
            ("python", "-m", "dispatcher"),
            ("python", "-m", "gpu_worker", "--engine", "echo"),
        ),
        client=("python", "-m", "benchmarks.millrace_noop"),
        environ={"MILLRACE_CAPACITY": "512", "MILLRACE_LOG_LEVEL": "warning", "MILLRACE_RESULT_TTL_MS": "60000"},
    ),
    Contender(
        "arq",
        workers=(("arq", "arq_noop.WorkerSettings"),),
        client=("python", "rivals/arq_noop.py"),
        packages=("arq==0.28.0", "hiredis==3.5.0", "uvloop==0.23.0"),
    ),
    Contender(
        "taskiq",
        workers=(
            (
                "taskiq",
                "worker",
                "taskiq_noop:broker",
                "--workers",
                "1",
                "--max-async-tasks",
                "32",
                "--log-level",
                "WARNING",
            ),
        ),
        client=("python", "rivals/taskiq_noop.py"),
        packages=("taskiq==0.13.0", "taskiq-redis==1.2.4", "hiredis==3.5.0", "uvloop==0.23.0"),
    ),
    Contender(
        "celery",
        workers=(
            (
                "celery",
                "-A",
                "celery_noop",
                "worker",
                "-P",
                "threads",
                "-c",
                "32",
                "--without-gossip",
                "--without-mingle",
                "-l",
                "WARNING",
            ),
        ),
        client=("python", "rivals/celery_noop.py"),
        packages=("celery[redis]==5.7.0", "hiredis==3.5.0"),
    ),
)


@dataclass(frozen=True)
class ServerCounters:
    """From INFO: what the server has done so far."""

    cpu_s: float
    reads: int  # times it read a socket: one per round trip, however many commands came with it
    commands: int

    @classmethod
    def read(cls, server: ValkeyServer) -> "ServerCounters":
        raw = server.call("INFO").decode(errors="replace")
        info = dict(line.split(":", 1) for line in raw.splitlines() if ":" in line)
        cpu_s = float(info["used_cpu_sys"]) + float(info["used_cpu_user"])
        return cls(cpu_s, int(info["total_reads_processed"]), int(info["total_commands_processed"]))


def main() -> None:
    options = parse_options()
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"machine: {describe_machine()}; server: {options.aof} AOF; {options.seconds:g} s a level")
    print(
        f"{'':10} {'in flight':>9} {'jobs/s':>8} {'p50 ms':>8} {'p99 ms':>8}"
        f" {'server us/job':>14} {'round trips/job':>16} failed"
    )
    for contender in CONTENDERS:
        if contender.name in options.only:
            results[contender.name] = run(contender, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=1))


def parse_options() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--in-flight", nargs="+", type=int, default=list(LEVELS), metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each level")
    parser.add_argument("--aof", choices=("no", "everysec", "always"), default="everysec")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def run(contender: Contender, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One fresh server, the contender's workers and client, every level; prints a row for each."""
    figures = {}
    programs = make_venv(contender) / "bin"
    with ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(aof=options.aof))
        environ = make_environ(contender, server)
        for number, command in enumerate(contender.workers):
            log = BENCH_DIR / f"{contender.name}-{number}.log"
            stack.enter_context(running(programs, command, environ, contender, log))
        client = stack.enter_context(running(programs, contender.client, environ, contender, None))
        ask(client, None)
        ask(client, {"in_flight": 8, "seconds": 1.0})  # warm-up
        for level in options.in_flight:
            before = ServerCounters.read(server)
            row = ask(client, {"in_flight": level, "seconds": options.seconds})
            row |= per_job(before, ServerCounters.read(server), row["jobs"])
            print_row(contender.name, level, row)
            figures[str(level)] = row
    return figures


def per_job(before: ServerCounters, after: ServerCounters, jobs: float) -> dict[str, float]:
    jobs = max(jobs, 1)
    return {
        "server_cpu_us": 1e6 * (after.cpu_s - before.cpu_s) / jobs,
        "round_trips": (after.reads - before.reads) / jobs,
        "commands": (after.commands - before.commands) / jobs,
    }


def print_row(name: str, level: int, row: dict[str, float]) -> None:
    print(
        f"{name:10} {level:9} {row['jobs_per_s']:8.0f} {row['p50_ms']:8.2f} {row['p99_ms']:8.2f}"
        f" {row['server_cpu_us']:14.1f} {row['round_trips']:16.2f} {row['failed']:6.0f}",
        flush=True,
    )


def make_venv(contender: Contender) -> Path:
    """The contender's own venv, made and filled on the first run; for Millrace the one that runs this."""
    if not contender.packages:
        return Path(sys.prefix)
    home = BENCH_DIR / f"venv-{contender.name}"
    stamp = home / "packages"
    if not stamp.exists() or stamp.read_text() != "\n".join(contender.packages):
        print(f"making {home.relative_to(ROOT)}: {', '.join(contender.packages)}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "-qq", *contender.packages], check=True)
        stamp.write_text("\n".join(contender.packages))
    return home


def make_environ(contender: Contender, server: ValkeyServer) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    path = os.pathsep.join((str(ROOT), str(HERE), str(HERE / "rivals")))
    own = {"REDIS_URL": server.url, "PYTHONPATH": path, "MILLRACE_VAR_DIR": str(BENCH_DIR / "var")}
    if contender.packages:
        own.pop("MILLRACE_VAR_DIR")
    return {**inherited, **own, **contender.environ}


@contextmanager
def running(
    programs: Path, command: Sequence[str], environ: dict[str, str], contender: Contender, log: Path | None
) -> Iterator[subprocess.Popen[str]]:
    """A process, ended with SIGTERM and after five seconds with SIGKILL. log=None: the client, spoken to by pipes."""
    BENCH_DIR.mkdir(parents=True, exist_ok=True)
    folder = HERE if contender.packages else ROOT
    with ExitStack() as stack:
        out = subprocess.PIPE if log is None else stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            [str(programs / command[0]), *command[1:]],
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE if log is None else subprocess.DEVNULL,
            stdout=out,
            stderr=None if log is None else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=5)


def ask(client: subprocess.Popen[str], request: dict[str, float] | None) -> dict[str, float]:
    """One line to the client (None: only wait for it to be ready), one line back."""
    assert client.stdin is not None
    assert client.stdout is not None
    if request is not None:
        client.stdin.write(json.dumps(request) + "\n")
        client.stdin.flush()
    line = client.stdout.readline()
    if not line:
        raise SystemExit(f"the client ended (status {client.wait(timeout=READY_TIMEOUT_S)}); see var/bench/*.log")
    answer: dict[str, float] = json.loads(line)
    return answer


def describe_machine() -> str:
    python, day = platform.python_version(), time.strftime("%Y-%m-%d")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {python}"
    return f"{machine}, commit {commit.strip() or 'unknown'}, {day}"


if __name__ == "__main__":
    main()
