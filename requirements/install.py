"""Make `.venv` from a lock: `python requirements/install.py service|worker|dev`. Called by the Makefile.

    service   what gateways, dispatchers, registry consumers and relays need
    worker    that, and torch with what the torch engine needs (`make run`)
    dev       that, and what tests and checks need (`make test`)

Exact versions and hashes come from `<kind>.lock`; torch is pinned in torch.in and installed last, because its wheels
differ by machine. A stamp in `.venv` says what is installed: the second time this neither runs pip nor needs a network.
Only the standard library here, and any Python from 3.11 on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
VENV = ROOT / ".venv"
KINDS = ("service", "worker", "dev")  # each contains the ones before it
OLDEST = (3, 11)
NOISE = ("WARNING: Location ", "[notice]", "WARNING: There was an error checking the latest version")


class InstallError(Exception):
    """One or a few lines that say what failed and what to do."""


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in KINDS:
        print(f"usage: install.py {'|'.join(KINDS)}", file=sys.stderr)
        return 2
    try:
        install(arguments[0])
    except InstallError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


def install(kind: str) -> None:
    """Idempotent: does nothing if this kind, or one that contains it, is installed from these very locks."""
    if any(stamp(one).exists() for one in KINDS[KINDS.index(kind) :]):
        return
    if sys.version_info < OLDEST:
        raise InstallError(f"Python {sys.version.split()[0]} is too old: install Python 3.11 or newer, or set PYTHON=")
    make_venv()
    lock = LOCKS / f"{kind}.lock"
    count = sum("==" in line and not line.startswith(" ") for line in lock.read_text(encoding="utf-8").splitlines())
    run_pip(f"{count} packages from requirements/{lock.name}", ["--require-hashes", "-r", str(lock)])
    if kind != "service":
        index = os.environ.get("TORCH_INDEX", "")
        where = ["--index-url", index] if index else []
        run_pip("torch", [*where, "-r", str(LOCKS / "torch.in")])
    run_pip("millrace itself", ["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    stamp(kind).touch()


def stamp(kind: str) -> Path:
    """Its name holds all that decides what is installed, so a new lock, Python or folder is noticed."""
    digest = hashlib.sha256(f"{VENV}\n{base_python()}\n".encode())
    for file in (LOCKS / f"{kind}.lock", LOCKS / "torch.in", ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    return VENV / f".installed-{kind}-{digest.hexdigest()[:16]}"


def base_python() -> str:
    """Which Python the venv was made from, by its own record; "" if there is no venv."""
    try:
        return (VENV / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ""


def make_venv() -> None:
    """A `.venv` that works and belongs to this folder; a broken or moved one is made anew."""
    python = VENV / "bin" / "python"
    moved = f" {VENV}\n" not in base_python() and "command = " in base_python()
    if (
        python.exists()
        and not moved
        and subprocess.run([python, "-m", "pip", "-V"], capture_output=True).returncode == 0
    ):
        return
    say(f"making .venv with Python {sys.version.split()[0]}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        raise InstallError(
            f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv\n"
            + "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        )


def run_pip(what: str, arguments: list[str]) -> None:
    """Run `pip install` quietly, with a line that shows how far it is. Raises InstallError with a hint."""
    downloads = Path(tempfile.mkdtemp(prefix="millrace-pip-"))
    environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "TMPDIR": str(downloads)}
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", *arguments]
    began = time.monotonic()
    say(f"installing {what} ...")
    try:
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            tail: deque[str] = deque(maxlen=12)
            reading = threading.Thread(target=collect, args=(pip, tail), daemon=True)
            reading.start()
            show_progress(pip, downloads, began)
            reading.join()
        if pip.returncode != 0:
            raise InstallError("\n".join([*tail, "", f"could not install {what}: {hint(' '.join(tail))}"]))
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    say(f"  done in {time.monotonic() - began:.0f} s")


def collect(pip: "subprocess.Popen[str]", tail: deque[str]) -> None:
    for line in pip.stdout or ():
        if line.strip() and not line.startswith(NOISE):
            tail.append(line.rstrip())


def show_progress(pip: "subprocess.Popen[str]", downloads: Path, began: float) -> None:
    """Wait for pip; on a terminal, a line that grows with what it downloaded."""
    while True:
        try:
            pip.wait(timeout=0.5 if sys.stdout.isatty() else None)
        except subprocess.TimeoutExpired:
            size = sum(file.stat().st_size for file in downloads.rglob("*") if file.is_file() and not file.is_symlink())
            print(f"\r  {size / 1e6:,.0f} MB, {time.monotonic() - began:.0f} s ", end="", flush=True)
            continue
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        return


def hint(output: str) -> str:
    """What a person should do, by what pip said."""
    for sign, advice in (
        ("No space left", "the disk is full: free some space, then run the same command again"),
        (
            "DO NOT MATCH THE HASHES",
            "a downloaded file is not the one that was tested: check your package index or proxy",
        ),
        ("Permission denied", "this folder is not yours to write: chown it, or clone it elsewhere"),
        (
            "CERTIFICATE_VERIFY_FAILED",
            "set PIP_CERT to your company's certificate file, then run the same command again",
        ),
        (
            "No matching distribution",
            "no package for this system or Python: README.md lists what is supported; "
            "PYTHON=python3.12 make ... takes another Python; an own index is set with PIP_INDEX_URL",
        ),
    ):
        if sign in output:
            return advice
    return "is there a network? Behind a proxy set HTTPS_PROXY, for an own index PIP_INDEX_URL, then run this again"


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
