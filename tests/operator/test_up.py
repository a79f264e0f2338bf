"""`millrace up` with a real embedded server and toy roles: starting, staying up, stopping, being killed."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from tests.harness.servers import ValkeyServer
from tests.operator.fleet import GATEWAYS, IDLE, UpProcess, free_port, is_alive, wait_for

Start = Callable[..., UpProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fleets in the test's folder and ends them all."""
    with contextlib.ExitStack() as endings:  # each is ended, even if ending another one fails

        def make(*lines: str, **settings: str) -> UpProcess:
            fleet = UpProcess(tmp_path, *lines, settings=settings)
            endings.callback(fleet.close)
            return fleet

        yield make


def test_it_starts_everything_announces_it_and_ctrl_c_ends_it_in_order(start: Start) -> None:
    """What a newcomer does first: start, paste, stop. The server stops last, and the data stays."""
    fleet = start(*GATEWAYS, IDLE)
    fleet.wait_until_ready()
    pids = fleet.pids()
    key = (fleet.folder / "var" / "api-key").read_text().strip()

    assert len(pids) == 4
    assert f"http://127.0.0.1:{fleet.ports[0]}" in fleet.output
    assert key in fleet.output
    assert fleet.server_url() in fleet.output
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.ports[1]}/ready", timeout=5) as answer:
        assert answer.status == 200

    fleet.process.send_signal(signal.SIGINT)

    assert fleet.wait_until_ended() == 0
    assert not any(is_alive(pid) for pid in pids)
    assert "idle stopped" in fleet.output
    assert "bye bye" in (fleet.folder / "var" / "log" / "server.log").read_text()
    assert not (fleet.folder / "var" / "redis-url").exists()
    assert list((fleet.folder / "var" / "server" / "data").rglob("*.aof"))


def test_secrets_are_readable_by_their_owner_only(start: Start) -> None:
    """The password stands in files of mode 600, and on no command line."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    var = fleet.folder / "var"

    for name in ("api-key", "redis-url", "server/password", "server/valkey.conf"):
        assert stat.S_IMODE((var / name).stat().st_mode) == 0o600, name
    password = (var / "server" / "password").read_text().strip()
    shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert password not in shown


async def test_key_address_and_data_are_the_same_the_next_time(start: Start) -> None:
    """REDIS_URL and the key may stand in scripts: a restart must not change them, nor lose what the server held."""
    first = start(*GATEWAYS)
    first.wait_until_ready()
    url, key = first.server_url(), (first.folder / "var" / "api-key").read_text()
    async with client(ServerAddress.parse(url)) as redis:
        await redis.set("kept", "yes")
    first.process.send_signal(signal.SIGTERM)
    first.wait_until_ended()

    second = start(*GATEWAYS)
    second.wait_until_ready()

    assert second.server_url() == url
    assert (second.folder / "var" / "api-key").read_text() == key
    async with client(ServerAddress.parse(url)) as redis:
        assert await redis.get("kept") == b"yes"


async def test_the_local_key_is_known_again_after_a_flush(start: Start) -> None:
    """FLUSHALL takes the keys too; the one in var/api-key comes back by itself."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    key = (fleet.folder / "var" / "api-key").read_text().strip()
    async with client(ServerAddress.parse(fleet.server_url())) as redis:
        await redis.flushall()
        keys = ApiKeys(redis, cache_s=0)
        for _ in range(100):
            record = await keys.check(key)
            if record is not None:
                break
            await asyncio.sleep(0.1)
        await keys.close()

    assert record is not None
    assert record.scopes == {"chat", "node"}


def test_a_role_that_dies_is_started_again_and_takes_nobody_with_it(start: Start) -> None:
    """honcho alone would end the whole fleet."""
    fleet = start(*GATEWAYS, IDLE)
    fleet.wait_until_ready()
    victim = int(re.findall(r"idle runs as (\d+)", fleet.output)[0])
    others = [pid for pid in fleet.pids() if pid != victim]

    os.kill(victim, signal.SIGKILL)

    wait_for(lambda: len(re.findall(r"idle runs as", fleet.output)) == 2, "a second idle")
    assert "idle ended with SIGKILL, starting it again" in fleet.output
    assert len(others) == 3
    assert all(is_alive(pid) for pid in others)


def test_a_killed_server_is_started_again_with_its_data(start: Start) -> None:
    """AOF everysec: the server comes back on the same address."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    url, pid_file = fleet.server_url(), fleet.folder / "var" / "server" / "pid"
    victim = int(pid_file.read_text())

    os.kill(victim, signal.SIGKILL)

    wait_for(lambda: int(pid_file.read_text()) != victim, "another server")
    wait_for(lambda: fleet.command("keys", "list").returncode == 0, "it answers")
    assert fleet.server_url() == url


def test_a_killed_up_leaves_no_orphans(start: Start) -> None:
    """kill -9 cannot be caught; the warden sees the pipe close and ends roles and server."""
    fleet = start(*GATEWAYS, IDLE)
    fleet.wait_until_ready()
    pids = fleet.pids()

    fleet.process.kill()
    fleet.wait_until_ended()

    wait_for(lambda: not any(is_alive(pid) for pid in pids), "no orphan")
    wait_for(lambda: not (fleet.folder / "var" / "redis-url").exists(), "the address is withdrawn")
    assert fleet.command("stop").stdout.strip() in {"no fleet runs here", "stopped"}


def test_a_second_ctrl_c_does_not_wait_for_a_stubborn_role(start: Start) -> None:
    """The first one drains for as long as MILLRACE_DRAIN_GRACE_MS says; an impatient person has another."""
    fleet = start(*GATEWAYS, "stubborn: exec $PYTHON {toy} stubborn", MILLRACE_DRAIN_GRACE_MS="60000")
    fleet.wait_until_ready()
    pids = fleet.pids()

    fleet.process.send_signal(signal.SIGINT)
    wait_for(lambda: "gateway stopped" in fleet.output, "the others stop at once")
    assert fleet.process.poll() is None
    fleet.process.send_signal(signal.SIGINT)

    assert fleet.wait_until_ended(10) == 0
    assert not any(is_alive(pid) for pid in pids)


def test_a_role_that_needs_a_person_stops_the_start_and_says_what_to_do(start: Start) -> None:
    """Status 2 before the fleet is ready: one line, the role's own."""
    never_ready = "gateway: exec $PYTHON {toy} idle"
    fleet = start(never_ready, "worker: exec $PYTHON {toy} misconfigured")

    assert fleet.wait_until_ended() == 1
    last = fleet.output.strip().splitlines()[-1]
    assert last.startswith("millrace: worker ended with status 2: cannot start: buy a GPU (see ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "cannot reach the server"),
        ({"REDIS_URL": "http://127.0.0.1"}, "REDIS_URL"),
        ({"MILLRACE_GATEWAY2_PORTS": "1"}, "did you mean MILLRACE_GATEWAY2_PORT?"),
        ({"MILLRACE_LEASE_MS": "soon"}, "MILLRACE_LEASE_MS='soon' is not a whole number"),
    ],
)
def test_what_cannot_work_is_one_line(start: Start, settings: dict[str, str], said: str) -> None:
    """No traceback, status 1, and nothing is left running."""
    fleet = start(*GATEWAYS, **settings)

    assert fleet.wait_until_ended() == 1
    assert said in fleet.output
    assert "Traceback" not in fleet.output
    assert fleet.output.count("\n") <= 2


def test_a_server_that_would_evict_jobs_is_refused(start: Start) -> None:
    """maxmemory-policy must be noeviction: an evicted job is a lost job."""
    with ValkeyServer(options={"maxmemory-policy": "allkeys-lru"}) as server:
        fleet = start(*GATEWAYS, REDIS_URL=server.url)

        assert fleet.wait_until_ended() == 1
    assert "maxmemory-policy allkeys-lru" in fleet.output
    assert "set it to noeviction" in fleet.output
    assert fleet.output.count("\n") <= 2


def test_a_taken_port_is_named_with_the_setting_that_changes_it(start: Start) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        fleet = start(*GATEWAYS, MILLRACE_GATEWAY2_PORT=str(port))

        assert fleet.wait_until_ended() == 1
    assert f"port {port} on 127.0.0.1 is taken" in fleet.output
    assert "MILLRACE_GATEWAY2_PORT" in fleet.output


def test_a_second_fleet_in_the_same_folder_is_refused(start: Start) -> None:
    """Two servers on the same files would ruin the data."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()

    second = fleet.command("up")

    assert second.returncode == 1
    assert "a fleet runs from" in second.stderr
    assert fleet.process.poll() is None


def test_stop_ends_the_fleet_of_its_folder(start: Start) -> None:
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()

    done = fleet.command("stop")

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stopped")
    assert fleet.wait_until_ended(1) == 0
    assert fleet.command("stop").stdout.strip() == "no fleet runs here"


def test_keys_are_made_listed_and_revoked_from_the_command_line(start: Start) -> None:
    """`--json` is what scripts read: id, key and scopes."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()

    made = json.loads(fleet.command("keys", "create", "--scope", "chat", "--scope", "node", "--json").stdout)
    listed = json.loads(fleet.command("keys", "list", "--json").stdout)
    assert (made["scopes"], made["key"][:3]) == (["chat", "node"], "mr_")
    assert made["id"] in [one["id"] for one in listed]
    assert not any("key" in one for one in listed)

    assert fleet.command("keys", "revoke", made["id"]).returncode == 0
    again = fleet.command("keys", "revoke", made["id"])
    assert (again.returncode, "there is no key" in again.stderr) == (1, True)


def test_the_revoked_local_key_does_not_come_back(start: Start) -> None:
    """Otherwise `millrace up` would register it again after two seconds."""
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    local = json.loads(fleet.command("keys", "list", "--json").stdout)[0]["id"]

    fleet.command("keys", "revoke", local)

    assert not (fleet.folder / "var" / "api-key").exists()


def test_a_given_server_is_used_and_none_is_started(start: Start, tmp_path: Path) -> None:
    fleet = start(*GATEWAYS)
    fleet.wait_until_ready()
    url = fleet.server_url()

    other = UpProcess(tmp_path / "other", *GATEWAYS, settings={"REDIS_URL": url})
    try:
        other.wait_until_ready()
        assert not (other.folder / "var" / "server").exists()
        assert other.server_url() == url
    finally:
        other.close()
