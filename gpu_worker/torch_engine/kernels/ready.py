"""Whether this machine can run the kernels, and having them compiled before the first step."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numba
import numpy
from llvmlite import binding

from gpu_worker.torch_engine.kernels.program import OPERATION, STEP, Team

log = logging.getLogger(__name__)

FUSED = {"x86_64": "fma", "AMD64": "fma"}  # without it each multiply-add would be a call; on ARM it is always there


def has_fused_multiply_add(machine: str, features: Mapping[str, bool]) -> bool:
    """machine: as platform.machine() says. features: by LLVM's names, see host_features."""
    return features.get(FUSED[machine], False) if machine in FUSED else machine in ("aarch64", "arm64")


def host_features() -> Mapping[str, bool]:
    return dict(binding.get_host_cpu_features())


def compile_now(say: Callable[[str], None]) -> None:
    """Returns when all is compiled or found in the cache. say: a line before and one after, if it has to compile."""
    with_fresh_cache(lambda: _compile(say), Path(numba.config.CACHE_DIR))


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
