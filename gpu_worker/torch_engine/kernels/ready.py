"""Whether this machine can run the kernels, and having them compiled before the first step."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numba
import numpy
from llvmlite import binding

from gpu_worker.torch_engine.kernels import LOCK
from gpu_worker.torch_engine.kernels.program import OPERATION, STEP, Team

log = logging.getLogger(__name__)

CACHE_NAME = re.compile(r"kernels-[0-9a-f]{16}")  # as cache_directory gives it
UNUSED_S = 30 * 24 * 3600
NEEDED = ("fma", "f16c")  # of x86: without them each multiply-add, or each float16, would be a call; ARM has both


def has_instructions(machine: str, features: Mapping[str, bool]) -> bool:
    """machine: as platform.machine() says. features: by LLVM's names, see host_features."""
    if machine in ("x86_64", "AMD64"):
        return all(features.get(name, False) for name in NEEDED)
    return machine in ("aarch64", "arm64")


def host_features() -> Mapping[str, bool]:
    return dict(binding.get_host_cpu_features())


def compile_now(say: Callable[[str], None]) -> None:
    """Returns when all is compiled or found in the cache. say: a line before and one after, if it has to compile."""
    directory = Path(numba.config.CACHE_DIR)
    directory.mkdir(parents=True, exist_ok=True)  # if another worker took it for unused a moment ago
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second worker waits and finds all compiled
        os.utime(lock.fileno())
        with_fresh_cache(lambda: _compile(say), directory)
    removed = remove_unused(directory, time.time())
    if removed:
        log.info("kernels of older versions removed", extra={"directories": [str(path) for path in removed]})


def remove_unused(current: Path, now_s: float) -> list[Path]:
    """Compiled code of other versions beside `current` that nobody started with for UNUSED_S; answers what it removed.

    Whatever cannot be read or removed stays. Workers that do this at once do not disturb each other.
    """
    removed: list[Path] = []
    if CACHE_NAME.fullmatch(current.name):  # else a directory of this process: what is beside it is not ours
        with contextlib.suppress(OSError):
            for directory in sorted(current.parent.iterdir()):
                ours = CACHE_NAME.fullmatch(directory.name) and directory.is_dir() and not directory.is_symlink()
                if ours and directory.name != current.name and _remove(directory, now_s - UNUSED_S):
                    removed.append(directory)
    return removed


def _remove(directory: Path, before_s: float) -> bool:
    """Unless it was used since, or somebody compiles there now. Whether it is gone."""
    try:
        with contextlib.ExitStack() as held:
            lock = directory / LOCK
            if lock.exists():  # versions before this one had none
                fcntl.flock(held.enter_context(lock.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if max(path.stat().st_mtime for path in (directory, *directory.iterdir())) < before_s:
                shutil.rmtree(directory)
                return True
    except OSError:  # held, read-only, or just removed by another worker
        pass
    return False


def with_fresh_cache(compile_all: Callable[[], None], directory: Path) -> None:
    """Once more without what was kept, if that cannot be used: a file that a crash cut off would stop every start."""
    try:
        compile_all()
    except Exception as error:  # noqa: BLE001 - what unpickling of damaged bytes raises can be anything
        log.warning("kept kernels cannot be used, they are compiled anew", extra={"reason": repr(error)})
        for kept in (*directory.rglob("*.nbi"), *directory.rglob("*.nbc")):
            kept.unlink(missing_ok=True)
        compile_all()


def _compile(say: Callable[[str], None]) -> None:
    cached = any(Path(numba.config.CACHE_DIR).rglob("program.work_through*.nbi"))
    if not cached:
        say("compiling the CPU kernels: about half a minute, once for this version")
    began_s = time.monotonic()
    team = Team(1, 0)
    team.run(numpy.zeros(0, OPERATION), numpy.zeros(1, STEP))
    team.help_once()
    if not cached:
        say(f"  done in {time.monotonic() - began_s:.0f} s")
