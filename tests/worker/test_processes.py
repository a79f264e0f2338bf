"""Workers as real processes under their parents: killed, frozen, poisoned and stopped, as it happens in the field."""

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bus.ids import JobId
from bus.link import to_entry
from tests.conftest import wait_until
from tests.harness.fleet import Fleet, RoleProcess, children_of
from tests.harness.servers import ValkeyServer
from tests.worker.house import SETTINGS, House, open_house

ECHO = ("gpu_worker", "--engine", "echo")


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server.url) as house:
        yield house


@pytest.fixture
def fleet(server: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    names = ("lease_ms", "renew_ms", "self_fence_ms", "unread_ms", "node_ttl_ms", "beat_ms", "breaker_ms")
    with Fleet(server.url, tmp_path, **{name: getattr(SETTINGS, name) for name in names}) as fleet:
        yield fleet


async def start_workers(fleet: Fleet, house: House, *names: str) -> list[RoleProcess]:
    workers = [fleet.start(*ECHO, "--node-id", name) for name in names]
    for name in names:
        await house.wait_for_node(name, 20)
    return workers


async def begin_on(house: House, node: str, prompt: str) -> JobId:
    """Submit a job, give it to the node, and wait until it speaks."""
    house.dispatching = False
    job_id = await house.submit(prompt)
    await house.assign_to(node)
    await wait_until(lambda: house.told[job_id].text)
    house.dispatching = True
    return job_id


def assert_whole(house: House, job_id: JobId, words: bytes, tokens: int) -> None:
    told, parts = house.told[job_id], words.split()
    assert told.text == b" ".join(parts[at % len(parts)] for at in range(tokens)), vars(told)
    assert told.faults == [] and len(told.ends) == 1 and told.ends[0].state == "done", vars(told)


async def test_a_killed_worker_costs_its_client_well_under_a_second(house: House, fleet: Fleet):
    """The parent sees the death and calls `down`; the other worker goes on from the stored tokens."""
    first, _ = await start_workers(fleet, house, "w1", "w2")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=100]] one two three")
    told = house.told[job_id]

    first.kill_child()
    killed_s = time.monotonic()
    known = len(told.text)
    await wait_until(lambda: "w2" in told.attempts and len(told.text) > known)
    stall_s = time.monotonic() - killed_s
    await house.end_of(job_id)

    print(f"stall {stall_s * 1000:.0f} ms")
    assert stall_s < 1.0
    assert_whole(house, job_id, b"one two three", 100)
    await house.wait_for_node("w1", 10)  # its parent has started another


@pytest.mark.slow
async def test_a_lost_machine_costs_one_lease(house: House, fleet: Fleet):
    first, _ = await start_workers(fleet, house, "w1", "w2")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=50]] one two three")

    first.kill()

    await house.end_of(job_id, SETTINGS.lease_ms / 1000 + 5)
    assert house.told[job_id].attempts == ["w1", "w2"]
    assert_whole(house, job_id, b"one two three", 50)


@pytest.mark.slow
async def test_a_frozen_worker_says_nothing_more_when_it_wakes(house: House, fleet: Fleet):
    """A zombie: its lease lapsed while it slept, its job ended elsewhere, and its memory knows nothing of it."""
    first, _ = await start_workers(fleet, house, "w1", "w2")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=60]] one two three")
    frozen = first.child_pid()

    os.kill(frozen, signal.SIGSTOP)
    try:
        await house.end_of(job_id, SETTINGS.lease_ms / 1000 + 8)
    finally:
        os.kill(frozen, signal.SIGCONT)
    after = await begin_on(house, "w1", "[[tokens=3 delay_ms=5]] x") if await is_back(house) else None

    assert_whole(house, job_id, b"one two three", 60)
    assert after is not None
    await house.end_of(after)
    assert_whole(house, after, b"x", 3)
    assert_whole(house, job_id, b"one two three", 60)


async def is_back(house: House) -> bool:
    await house.wait_for_node("w1", 10)
    return True


@pytest.mark.slow
async def test_a_poison_job_becomes_a_dead_letter_and_its_neighbours_are_not_blamed(house: House, fleet: Fleet):
    await start_workers(fleet, house, "w1", "w2")
    neighbours = [await house.submit(f"[[delay_ms=50 tokens=60]] n{number}") for number in range(3)]
    await wait_until(lambda: all(house.told[job].text for job in neighbours))

    poison = await house.submit("[[poison]] drink me")
    end = await house.end_of(poison, 40)
    ends = await house.ends_of(neighbours, 30)

    assert end.state == "failed" and len(house.told[poison].attempts) == SETTINGS.crashes_max
    assert {one.state for one in ends} == {"done"}
    for number, job in enumerate(neighbours):
        assert_whole(house, job, b"n%d" % number, 60)
    raw = await house.cell.link.send("XRANGE", house.cell.keys.dead, "-", "+")
    assert poison in str([to_entry(one) for one in raw])


async def test_a_terminated_worker_hands_its_jobs_over_and_leaves_the_fleet(house: House, fleet: Fleet):
    first, _ = await start_workers(fleet, house, "w1", "w2")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=100]] one two three")

    assert first.stop() == 0

    await house.end_of(job_id)
    assert_whole(house, job_id, b"one two three", 100)
    record = await house.cell.job(job_id)
    assert record is not None and record.crashes == 0
    node = await house.node("w1")
    assert node is None or not node.leased


@pytest.mark.slow
async def test_the_worker_of_a_killed_parent_drains_and_ends(house: House, fleet: Fleet):
    """Nothing is orphaned, and what it ran goes on elsewhere."""
    first, _ = await start_workers(fleet, house, "w1", "w2")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=100]] one two three")
    child = first.child_pid()

    first.process.kill()

    await wait_until(lambda: not Path(f"/proc/{child}").exists(), 10)
    await house.end_of(job_id)
    assert_whole(house, job_id, b"one two three", 100)


@pytest.mark.slow
async def test_a_new_worker_takes_over_at_once_from_a_dead_one_of_its_name(house: House, fleet: Fleet):
    """The lock proves that the older process on this machine is dead, so its lease need not lapse."""
    [first] = await start_workers(fleet, house, "w1")
    job_id = await begin_on(house, "w1", "[[delay_ms=20 tokens=100]] one two three")
    first.kill()

    began_s = time.monotonic()
    fleet.start(*ECHO, "--node-id", "w1", lease_ms=1500)
    await house.end_of(job_id, 15)

    print(f"answered {time.monotonic() - began_s:.1f} s after the start")
    assert_whole(house, job_id, b"one two three", 100)


@pytest.mark.slow
async def test_workers_without_a_name_take_different_ones(house: House, fleet: Fleet):
    workers = [fleet.start(*ECHO) for _ in range(2)]

    async def are_two() -> bool:
        return len(await house.cell.node_names()) == 2

    await wait_until(are_two, 20)
    assert all(len(children_of(one.process.pid)) == 1 for one in workers)


async def test_workers_of_two_folders_with_one_host_name_take_different_names(
    house: House, fleet: Fleet, tmp_path: Path
):
    """The lock of a name is one folder's; the second learns from the server that the first one lives."""
    fleet.start(*ECHO)

    async def are(count: int) -> bool:
        views = [await house.cell.node(node) for node in await house.cell.node_names()]
        return len([view for view in views if view is not None and view.leased and view.alive]) == count

    await wait_until(lambda: are(1), 20)
    began_s = time.monotonic()
    other = fleet.start(*ECHO, var_dir=tmp_path / "other")
    await wait_until(lambda: are(2), 20)

    print(f"up after {time.monotonic() - began_s:.1f} s")
    names = sorted(await house.cell.node_names())
    assert [name.rpartition("-")[2] for name in names] == ["1", "2"]
    assert "the name is taken" in other.log() and other.log().count("child started") == 2


async def test_a_wrong_node_id_is_a_one_line_error(fleet: Fleet):
    worker = fleet.start(*ECHO, "--node-id", "not a name")

    assert worker.process.wait(15) == 2
    [line] = [line for line in worker.log().splitlines() if "error" in line]
    assert "MILLRACE_NODE_ID" in line
