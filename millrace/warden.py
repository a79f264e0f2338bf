"""Ends a fleet whose `millrace up` was killed: roles first, the embedded server last. Nothing is orphaned.

    millrace up --pipe--> warden        "+ 123" started, "- 123" ended, "server 99", "bye"
         |                   |
      kill -9            end of file without "bye": SIGTERM to every role, wait, SIGKILL; then the same for the server

It is run as a plain script by `millrace up`, imports only the standard library (about 9 MB), and holds the fleet's
lock (millrace.lock) until it is done.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable

ROLES_GRACE_S = 25.0  # longer than a gateway's drain
SERVER_GRACE_S = 10.0


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    roles: set[int] = set()
    servers: set[int] = set()
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "bye":
            return
        if word == "+":
            roles.add(int(number))
        elif word == "-":
            roles.discard(int(number))
            servers.discard(int(number))
        elif word == "server":
            servers = {int(number)}
    end(roles, ROLES_GRACE_S)
    end(servers, SERVER_GRACE_S)
    if len(sys.argv) > 1:  # the file that says that a fleet runs here
        try:
            os.unlink(sys.argv[1])
        except OSError:
            pass


def end(pids: Iterable[int], grace_s: float) -> None:
    """SIGTERM, then SIGKILL to what is left of each group: a line without `exec` leaves more than its leader.

    Each leads a session of its own, which shows that it is ours.
    """
    left = {pid for pid in pids if is_ours(pid)}
    for pid in left:
        send(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = {pid for pid in left if is_ours(pid) and send(pid, 0)}
    for pid in left:
        send(pid, signal.SIGKILL)


def is_ours(pid: int) -> bool:
    """It leads its session, or is gone, so that its number can only name the group that it left behind."""
    try:
        return os.getsid(pid) == pid
    except OSError:
        return True


def send(pid: int, number: int) -> bool:
    """To the whole group; whether there is one."""
    try:
        os.killpg(pid, number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
