"""`millrace worker`: one more worker, in the foreground, for the fleet of this folder or the server of REDIS_URL."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bus.settings import Settings
from millrace.preflight import fetch_model


def run_worker(settings: Settings, environ: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Replaces this process by the worker's parent, so that Ctrl-C and signals reach it directly. Does not return."""
    if settings.engine == "torch" and not any(one.startswith("--engine") for one in arguments):
        fetch_model(settings, environ, Path.cwd())
    command = [sys.executable, "-m", "gpu_worker", *arguments]
    os.execve(sys.executable, command, {**environ, "REDIS_URL": settings.redis_url})
