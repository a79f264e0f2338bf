"""`millrace stop`: end the fleet that runs from this folder, and wait until every process of it is gone."""

import contextlib
import os
import signal
from pathlib import Path

from millrace.lock import running_pid, wait_until_free
from millrace.preflight import CannotStart


def run_stop(var_dir: Path, timeout_s: float) -> int:
    """Returns 0 once nothing runs. Raises CannotStart if the fleet does not end within the time."""
    pid = running_pid(var_dir)
    if pid is None:
        print("no fleet runs here")
        return 0
    if pid:
        print(f"stopping the fleet (process {pid}) ...", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not wait_until_free(var_dir, timeout_s):
        raise CannotStart(
            f"the fleet (process {pid}) did not stop within {timeout_s:g} s: kill -9 {pid} ends it as well"
        )
    print("stopped")
    return 0
