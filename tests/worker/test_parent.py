"""The restarting parent: what it decides, and how it behaves as a real process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bus.process.node_lock import take_node_lock
from bus.process.parent import STABLE_S, crashes_after, describe_exit, fold_fact, restart_delay_s, split_child_flag

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_first_restart_is_almost_immediate_and_a_crash_loop_slows_down():
    """A killed worker must be back at once; a broken one must not eat the machine."""
    delays = [restart_delay_s(crashes) for crashes in range(1, 11)]

    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_a_child_that_lived_long_enough_starts_the_backoff_anew():
    assert crashes_after(5, lived_s=STABLE_S) == 1
    assert crashes_after(5, lived_s=STABLE_S - 0.1) == 6


def test_only_what_was_not_given_up_must_be_given_back():
    facts: frozenset[str] = frozenset()
    for line in [
        "ready",
        "owns 0 a a.1",
        "owns 1 b b.1",
        "lease 0 a.1",
        "left 0 a a.1",
        "dropped 0 a.1",
        "left 0 never x.1",
    ]:
        facts = fold_fact(facts, line)

    assert facts == {"owns 1 b b.1"}


def test_the_child_flag_is_taken_out_of_the_roles_own_arguments():
    assert split_child_flag(["--engine", "echo"]) == (["--engine", "echo"], None)
    assert split_child_flag(["--child", "7", "--engine", "echo"]) == (["--engine", "echo"], 7)


def test_an_exit_is_described_as_a_person_would():
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "SIGKILL"


def test_the_first_free_name_is_locked_and_tells_what_its_dead_holder_left(tmp_path: Path):
    """The lock proves that the older process is dead, so what it listed can be given back at once."""
    first = take_node_lock(tmp_path, ["n-1", "n-2"])
    assert first is not None
    first.remember(["owns 0 n-1 n-1.5"])
    second = take_node_lock(tmp_path, ["n-1", "n-2"])
    assert second is not None and second.name == "n-2"
    assert take_node_lock(tmp_path, ["n-1", "n-2"]) is None

    first.release()
    heir = take_node_lock(tmp_path, ["n-1", "n-2"])

    assert heir is not None and heir.name == "n-1"
    assert heir.left_behind == ("owns 0 n-1 n-1.5",)
    for lock in (heir, second):
        lock.release()


class SampleRole:
    """The sample role as a process of its own, with its folder of orders and marks."""

    def __init__(self, folder: Path, order: str, *, joins: bool = False) -> None:
        """joins: it is not told a server and finds that of the fleet of its folder."""
        self.folder = folder
        (folder / "orders").write_text(order)
        self.output = (folder / "output").open("w+")
        settings = {
            "REDIS_URL": "redis://127.0.0.1:1",
            "MILLRACE_VAR_DIR": str(folder),
            "MILLRACE_LEASE_MS": "900",
            "MILLRACE_RENEW_MS": "200",
            "MILLRACE_SELF_FENCE_MS": "700",
            "MILLRACE_DRAIN_GRACE_MS": "500",
        }
        if joins:
            (folder / "redis-url").write_text(settings.pop("REDIS_URL") + "\n")
        environ = {**os.environ, **settings}
        command = [sys.executable, "-m", "tests.worker.sample_role"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environ, stderr=self.output, start_new_session=True
        )

    def pids(self) -> list[int]:
        try:
            return [int(line) for line in (self.folder / "pids").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def log(self) -> str:
        return (self.folder / "output").read_text()

    def wait_until(self, what: Callable[[], bool], timeout_s: float = 10.0) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


Start = Callable[..., SampleRole]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    roles: list[SampleRole] = []

    def start_role(order: str, **how: bool) -> SampleRole:
        roles.append(SampleRole(tmp_path, order, **how))
        return roles[-1]

    yield start_role
    for role in roles:
        if role.process.poll() is None:
            role.process.kill()
        role.process.wait(10)
        for pid in role.pids():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        role.output.close()


def test_a_killed_child_is_replaced_and_the_reason_is_logged(start: Start):
    role = start("live")
    role.wait_until(lambda: len(role.pids()) == 1)

    os.kill(role.pids()[0], signal.SIGKILL)

    role.wait_until(lambda: len(role.pids()) == 2)
    role.wait_until(lambda: "how=SIGKILL" in role.log())
    role.process.terminate()
    assert role.process.wait(10) == 0
    assert (role.folder / "stopped").exists()
    assert not is_alive(role.pids()[1])


def test_a_child_that_crashes_says_where(start: Start):
    role = start("crash")
    role.wait_until(lambda: "how='exit code 1'" in role.log())

    assert "RuntimeError: a bug" in role.log()
    assert "sample_role.py" in role.log()


def test_a_configuration_error_ends_the_parent_with_one_line(start: Start):
    """Nobody is helped by a role that restarts for ever without its model."""
    role = start("config")

    assert role.process.wait(15) == 2
    assert "cannot start: no model: fetch one" in role.log()
    assert "Traceback" not in role.log()
    assert len(role.pids()) == 1


def test_the_child_stops_in_good_order_when_its_parent_is_killed(start: Start):
    """Nothing is orphaned, and what the child holds is not lost either."""
    role = start("live")
    role.wait_until(lambda: "ready" in role.log())

    role.process.kill()

    role.wait_until(lambda: not is_alive(role.pids()[0]))
    assert (role.folder / "stopped").exists()


def test_a_child_that_does_not_stop_is_killed_by_the_second_signal(start: Start):
    role = start("deaf")
    role.wait_until(lambda: "ready" in role.log())
    role.process.send_signal(signal.SIGINT)
    role.wait_until(lambda: "stopping" in role.log())
    assert is_alive(role.pids()[0])

    role.process.send_signal(signal.SIGINT)

    role.wait_until(lambda: not is_alive(role.pids()[0]))
    assert role.process.wait(10) == 0


def test_a_child_whose_name_lives_elsewhere_gets_the_next_one(start: Start):
    """Two folders or machines with one host name begin with the same default."""
    role = start("taken sample-1")
    role.wait_until(lambda: "ready" in role.log())

    assert "next=sample-2" in role.log()
    assert len(role.pids()) == 2
    assert (role.folder / "run" / "sample-2.lock").read_text().startswith("owns 0 sample-2 ")


def test_a_child_without_another_name_says_what_to_do(start: Start):
    role = start("taken sample-2")  # sample-1 is held by another process of this folder
    role.process.kill()
    role.process.wait(10)
    held = take_node_lock(role.folder, ["sample-1"])
    assert held is not None
    second = start("taken sample-2")

    assert second.process.wait(15) == 2
    assert "cannot start: the name sample-2 is taken by a living process elsewhere" in second.log()
    held.release()


def test_a_role_that_joined_a_fleet_ends_with_it(start: Start):
    """It would ask for the server that has gone for ever."""
    role = start("live", joins=True)
    role.wait_until(lambda: "ready" in role.log())

    (role.folder / "redis-url").unlink()

    assert role.process.wait(10) == 0
    assert f"the fleet of {role.folder} has been stopped, so this process ends as well" in role.log()
    assert (role.folder / "stopped").exists()


def test_a_role_that_was_told_its_server_does_not_care_about_the_fleet_of_its_folder(start: Start):
    role = start("live")
    (role.folder / "redis-url").write_text("redis://127.0.0.1:2\n")
    role.wait_until(lambda: "ready" in role.log())

    (role.folder / "redis-url").unlink()
    time.sleep(1.5)

    assert role.process.poll() is None
