"""`millrace worker`: one more worker, in the foreground, for the fleet of this folder or the server of REDIS_URL."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bus.settings import PREFIX, Settings
from millrace.preflight import fetch_model


def run_worker(settings: Settings, environ: Mapping[str, str]) -> int:
    """Replaces this process by the worker's parent, so that Ctrl-C and signals reach it directly. Does not return.

    Raises CannotStart if a torch worker's model cannot be fetched.
    """
    others = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    chosen = {**others, **settings.to_env()}
    if not environ.get("REDIS_URL", "").strip():
        del chosen["REDIS_URL"]  # it finds the fleet's server as we did, and ends with that fleet
    if settings.engine == "torch":
        fetch_model(settings, chosen, Path.cwd())
    os.execve(sys.executable, [sys.executable, "-m", "gpu_worker"], chosen)
