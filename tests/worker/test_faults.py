"""The world breaks at every point that a worker touches: replies are lost, servers die and forget."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bus.ids import JobId
from tests.conftest import wait_until
from tests.harness.proxies import fault_proxy
from tests.harness.servers import ValkeyServer
from tests.worker.house import House, open_house
from tests.worker.test_service import worker

PROMPT = "[[delay_ms=10 tokens=12]] one two three"
TEXT = b"one two three one two three one two three one two three"


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server.url) as house:
        yield house


def assert_answered_once(house: House, job_id: JobId) -> None:
    told = house.told[job_id]
    assert told.text == TEXT, vars(told)
    assert len(told.ends) == 1 and told.ends[0].state == "done", vars(told)
    assert told.faults == []


async def answer_with_lost_reply(house: House, server: ValkeyServer, nth: int) -> None:
    """One job, through a proxy that lets the nth command from its submission run and breaks its connection."""
    node = f"w{nth}"
    async with fault_proxy(server.port) as proxy, worker(house, node, url=proxy.url):
        proxy.swallow_after(nth)
        house.dispatching = False
        job_id = await house.submit(PROMPT)
        await house.assign_to(node)

        await house.end_of(job_id)

        print(f"reply of command {nth} swallowed: {proxy.swallowed.is_set()}, attempts {house.told[job_id].attempts}")
        assert_answered_once(house, job_id)
        assert await house.cell.link.send("ZCARD", house.cell.keys.node_running((await house.node(node)).node)) == 0


async def test_a_lost_reply_of_a_flush_or_finish_changes_nothing_for_the_reader(house: House, server: ValkeyServer):
    """Each of the first commands of a job's life in turn is executed, and its reply lost."""
    for nth in (1, 2, 3, 5, 8):
        await answer_with_lost_reply(house, server, nth)


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(1, 41))
async def test_a_lost_reply_anywhere_changes_nothing_for_the_reader(house: House, server: ValkeyServer, nth: int):
    await answer_with_lost_reply(house, server, nth)


async def test_a_broken_connection_every_few_ms_delays_but_loses_nothing(house: House, server: ValkeyServer):
    async with fault_proxy(server.port) as proxy, worker(house, url=proxy.url):
        job_ids = [await house.submit(f"[[delay_ms=30 tokens=30]] w{number} x") for number in range(4)]
        for _ in range(6):
            await asyncio.sleep(0.15)
            proxy.reset()

        ends = await house.ends_of(job_ids, 15)

        for number, job_id in enumerate(job_ids):
            told = house.told[job_id]
            assert told.text == b" ".join([b"w%d" % number, b"x"] * 15), vars(told)
            assert told.faults == [] and len(told.ends) == 1
        assert {end.state for end in ends} == {"done"}


@pytest.mark.slow
async def test_a_worker_without_a_server_is_silent_and_goes_on_when_it_is_back(house: House, server: ValkeyServer):
    """Self-fencing: after the lease may have lapsed, nothing is published until a renewal succeeds."""
    async with fault_proxy(server.port) as proxy, worker(house, url=proxy.url):
        house.dispatching = False
        job_id = await house.submit("[[delay_ms=50 tokens=80]] a b")
        await house.assign_to("w1")
        await wait_until(lambda: house.told[job_id].text)
        proxy.refuse = True
        proxy.reset()

        async def was_taken_away() -> bool:
            record = await house.cell.job(job_id)
            return record is not None and record.crashes == 1

        await wait_until(was_taken_away, 8)
        heard = house.told[job_id].text
        proxy.refuse = False
        await house.wait_for_node("w1")
        assert house.told[job_id].text == heard
        house.dispatching = True

        await house.end_of(job_id, 15)

        assert house.told[job_id].text == b" ".join([b"a", b"b"] * 40)
        assert house.told[job_id].faults == [] and len(house.told[job_id].ends) == 1


async def test_a_server_killed_in_mid_stream_costs_no_answer(own_server: ValkeyServer):
    """AOF everysec: the last second may be gone, with it stored text, assignments and finishes."""
    async with open_house(own_server.url) as house, worker(house, "w1"), worker(house, "w2"):
        job_ids = [await house.submit(f"[[delay_ms=40 tokens=40]] w{number} x") for number in range(4)]
        await asyncio.sleep(1.1)  # the submits are on disk now
        own_server.kill()
        await asyncio.sleep(0.3)
        own_server.start()

        ends = await house.ends_of(job_ids, 20)

        assert {end.state for end in ends} == {"done"}
        for number, job_id in enumerate(job_ids):
            assert await house.whole_text(job_id) == b" ".join([b"w%d" % number, b"x"] * 20)
            assert len(house.told[job_id].ends) == 1
