"""The relay in the whole: real server, registry consumer, dispatcher, relay and HTTP nodes that misbehave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bus.calls.caller import Caller
from bus.calls.handle import Finished, JobHandle, TextDelta
from bus.cell import Cell
from bus.codec.events import HttpBeat, NodeRegistered
from bus.codec.wire import LockTaken, NodeView
from bus.ids import ModelName, NodeId
from bus.jobs import ChatJob, Message
from bus.link import ServerAddress
from bus.process.child import ParentLine
from bus.settings import Settings
from dispatcher.service import run as run_dispatcher
from gpu_worker.relay_engine.service import run as run_relay
from registry_consumer.service import run as run_registry
from tests.conftest import wait_until
from tests.harness.fake_openai import FakeNode, Knobs, answer_text
from tests.harness.fleet import QUICK
from tests.harness.servers import ValkeyServer

MODEL = ModelName("fake")
PROMPT = "How does a mill work?"
SETTINGS = Settings().changed(
    **{**QUICK, "node_ttl_ms": 60_000, "breaker_ms": 2_000},
    model=MODEL,
    node_allow="127.0.0.0/8",
    relay_connect_ms=500,
    relay_first_byte_ms=1_000,
    relay_idle_ms=600,
)


class House:
    """Everything but the gateways, in this process; and one caller."""

    def __init__(self, server: ValkeyServer, caller: Caller) -> None:
        self.settings = caller.settings.changed(redis_url=server.url)
        self.caller = caller
        self.cell: Cell = caller.cell_of(MODEL)
        self._roles: list[tuple[asyncio.Task[None], ParentLine]] = []

    def start(self, role: Any, **settings: Any) -> ParentLine:
        parent = ParentLine()
        task = asyncio.create_task(role(self.settings.changed(**settings), parent))
        self._roles.append((task, parent))
        return parent

    async def stop(self, parent: ParentLine) -> None:
        """The graceful way."""
        parent.stop.set()
        async with asyncio.timeout(8):
            await next(task for task, one in self._roles if one is parent)

    async def close(self) -> None:
        for _, parent in reversed(self._roles):
            parent.stop.set()
        async with asyncio.timeout(10):
            for task, _ in reversed(self._roles):
                await task

    async def register(self, name: str, url: str, *, capacity: int = 4, until_served: bool = True) -> None:
        node = NodeId(name)
        lock = await self.cell.lock_node(node, 5_000)
        assert isinstance(lock, LockTaken)
        event = NodeRegistered(node, lock.epoch, "key", url, (MODEL,), capacity=capacity, layers=(0, 1))
        answer = await self.caller.ask(event, self.cell, 5.0)
        await self.cell.unlock_node(node, lock.epoch)
        assert answer is not None and answer.status == "applied", answer
        if until_served:
            await self.served(name)

    async def view(self, name: str) -> NodeView:
        found = await self.cell.node(NodeId(name))
        assert found is not None
        return found

    async def served(self, name: str, by: str = "relay:") -> None:
        async def is_served() -> bool:
            view = await self.view(name)
            return view.leased and view.state == "up" and view.owner.startswith(by)

        await wait_until(is_served, timeout_s=8)

    async def chat(self, *, stream: bool = True, max_tokens: int = 12, prompt: str = PROMPT) -> JobHandle:
        job = ChatJob(model=MODEL, messages=(Message("user", prompt),), max_tokens=max_tokens, stream=stream)
        return await self.caller.submit(job)


async def text_of(handle: JobHandle, *, timeout_s: float = 15) -> tuple[str, Finished]:
    """The whole answer, put together from its pieces, whose offsets must fit; and its one end."""
    text = b""
    async with asyncio.timeout(timeout_s):
        async for event in handle:
            if isinstance(event, TextDelta):
                assert event.offset == len(text), "a gap or a repeat"
                text += event.text
            elif isinstance(event, Finished):
                return text.decode(), event
    raise AssertionError("no end")


def expected(tokens: int = 12, prompt: str = PROMPT) -> str:
    return answer_text(prompt, tokens)


@contextlib.asynccontextmanager
async def open_house(server: ValkeyServer, **settings: Any) -> AsyncIterator[House]:
    async with Caller(ServerAddress.parse(server.url), SETTINGS.changed(**settings)) as caller:
        made = House(server, caller)
        made.start(run_registry)
        made.start(run_dispatcher)
        try:
            yield made
        finally:
            await made.close()


@pytest.fixture
async def house(server: ValkeyServer) -> AsyncIterator[House]:
    async with open_house(server) as made:
        yield made


@pytest.fixture
async def relay(house: House) -> ParentLine:
    return house.start(run_relay, node_id="r1")


@pytest.fixture
async def nodes() -> AsyncIterator[tuple[FakeNode, FakeNode]]:
    async with FakeNode(Knobs(delay_ms=5)) as a, FakeNode(Knobs(delay_ms=5)) as b:
        yield a, b


async def test_a_registered_node_answers_through_the_relay(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    await house.register("a", nodes[0].url)

    text, finished = await text_of(await house.chat())

    assert text == expected() and finished.ended.state == "done" and finished.ended.reason == "length"
    assert finished.ended.new_tokens == 12
    whole, _ = await text_of(await house.chat(stream=False))
    assert whole == expected()
    assert (await house.view("a")).ok == 2


async def test_a_simple_node_answers_through_the_relay(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    nodes[0].turn(mode="simple")
    await house.register("a", nodes[0].url)

    assert (await text_of(await house.chat()))[0] == expected()


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("how", ["silent_at", "break_at"])
async def test_a_stream_whose_node_falls_silent_goes_on_at_another_without_repetition(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode], how: str, continues: bool
) -> None:
    for node in nodes:
        node.turn(owned_by="vllm" if continues else "fake", continues=continues, delay_ms=20, **{how: 5})
    await house.register("a", nodes[0].url)
    await house.register("b", nodes[1].url)
    handle = await house.chat()
    await wait_until(lambda: any(node.calls and node.calls[0].tokens_sent >= 5 for node in nodes))
    first, second = sorted(nodes, key=lambda node: -len(node.calls))
    second.turn(**{how: None})

    text, finished = await text_of(handle)

    assert text == expected() and finished.ended.state == "done"
    assert len(first.calls) == 1 and len(second.calls) == 1


async def test_other_words_on_the_other_node_interrupt_and_say_so(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    for node in nodes:
        node.turn(break_at=5, delay_ms=20)
    await house.register("a", nodes[0].url)
    await house.register("b", nodes[1].url)
    handle = await house.chat()
    await wait_until(lambda: any(node.calls for node in nodes))
    other = next(node for node in nodes if not node.calls)
    other.turn(break_at=None, answer="a different story altogether")

    text, finished = await text_of(handle)

    assert text and expected(5).startswith(text), "an aborted connection may lose what it has just sent"
    assert (finished.ended.state, finished.ended.error_code) == ("failed", "interrupted")


@pytest.mark.parametrize(
    "knobs",
    [
        {"silent": True},
        pytest.param({"refuse": True}, marks=pytest.mark.slow),
        {"status": 500},
        pytest.param({"models_status": 500}, marks=pytest.mark.slow),
    ],
    ids=str,
)
async def test_a_black_hole_does_not_eat_jobs_because_its_load_looks_low(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode], knobs: dict[str, Any]
) -> None:
    """Every job is answered by the good node; after its first failures the bad one is hardly asked any more."""
    hole, good = nodes
    hole.turn(**knobs)
    await house.register("hole", hole.url, capacity=16)
    await house.register("good", good.url, capacity=2)

    answers = [await text_of(await house.chat(prompt=f"job {number}")) for number in range(10)]

    assert [text for text, _ in answers] == [expected(prompt=f"job {number}") for number in range(10)]
    assert (await house.view("hole")).breaker_n > 0
    assert len(hole.calls) + hole.model_lists <= 6
    assert len(good.calls) >= 10


@pytest.mark.slow
async def test_a_node_that_came_back_is_tried_again_and_used(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    hole, good = nodes
    hole.turn(status=503)
    await house.register("hole", hole.url)
    handle = await house.chat()
    await wait_until(lambda: hole.calls)
    await house.register("good", good.url)
    await text_of(handle)
    hole.turn(status=0)

    async def used_again() -> bool:
        await text_of(await house.chat())
        return (await house.view("hole")).ok > 0

    await wait_until(used_again, timeout_s=10)
    assert (await house.view("hole")).breaker_n == 0


async def test_a_request_that_a_node_refuses_fails_at_once_and_is_not_held_against_it(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    nodes[0].turn(context_length=2)
    await house.register("a", nodes[0].url)

    text, finished = await text_of(await house.chat())

    assert (text, finished.ended.state, finished.ended.error_code) == ("", "failed", "context_length_exceeded")
    view = await house.view("a")
    assert (view.failed, view.breaker_n, view.client_errors, len(nodes[0].calls)) == (0, 0, 1, 1)


async def test_a_node_that_refuses_every_request_costs_no_client_its_answer(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    """It is always idle, so without a word against it each job would end there."""
    nodes[0].turn(status=400, error_message="model not loaded")
    await house.register("bad", nodes[0].url)
    await house.register("good", nodes[1].url)

    for _ in range(6):
        handles = [await house.chat() for _ in range(3)]
        answers = await asyncio.gather(*(text_of(handle) for handle in handles))
        assert {text for text, _ in answers} == {expected()}

    assert nodes[0].calls
    assert (await house.view("bad")).breaker_n > 0


async def test_a_request_that_the_only_node_refuses_ends_with_its_words(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    nodes[0].turn(status=400, error_message="model not loaded")
    await house.register("bad", nodes[0].url)

    _, finished = await text_of(await house.chat(), timeout_s=5)

    assert (finished.ended.error_code, finished.ended.error_message) == ("bad_request", "model not loaded")
    assert len(nodes[0].calls) == 2


async def test_a_cancelled_job_closes_the_call_to_its_node(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    nodes[0].turn(delay_ms=30)
    await house.register("a", nodes[0].url)
    handle = await house.chat(max_tokens=1000)
    await wait_until(lambda: nodes[0].calls)

    await house.caller.cancel(handle.job_id, "test")

    assert (await text_of(handle))[1].ended.state == "cancelled"
    async with asyncio.timeout(3):
        await nodes[0].calls[0].over.wait()
    assert nodes[0].calls[0].aborted


async def test_a_node_that_moves_is_served_at_its_new_address(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    await house.register("a", nodes[0].url)
    await text_of(await house.chat())

    await house.register("a", nodes[1].url)

    async def answered_by_the_new_one() -> bool:
        text, finished = await text_of(await house.chat())
        assert text == expected() and finished.ended.state == "done"
        return bool(nodes[1].calls)

    await wait_until(answered_by_the_new_one, timeout_s=8)


async def test_when_a_relay_stops_another_takes_its_nodes_and_the_streams_go_on(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    nodes[0].turn(delay_ms=60)
    await house.register("a", nodes[0].url)
    handle = await house.chat(max_tokens=30)
    await wait_until(lambda: nodes[0].calls and nodes[0].calls[0].tokens_sent > 3)
    house.start(run_relay, node_id="r2")
    relay.stop.set()

    text, finished = await text_of(handle)

    assert text == expected(30) and finished.ended.state == "done"
    await house.served("a", by="relay:r2")


async def test_nodes_are_shared_between_relays_and_each_has_one(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    house.start(run_relay, node_id="r2")
    await asyncio.sleep(0.3)

    for number in range(8):
        await house.register(f"n{number}", nodes[number % 2].url)

    owners = {(await house.view(f"n{number}")).owner.split(".")[0] for number in range(8)}
    assert owners == {"relay:r1", "relay:r2"}


async def test_an_address_that_is_not_permitted_is_never_called(house: House, nodes: tuple[FakeNode, FakeNode]) -> None:
    """The name may have been bound anew after the gateway's check."""
    house.start(run_relay, node_id="r1", node_allow="")
    await house.register("a", nodes[0].url)
    await house.register("b", "http://localhost:1")
    handle = await house.chat(stream=False)

    _, finished = await text_of(handle)

    assert finished.ended.state == "failed" and "not permitted" in finished.ended.error_message
    assert nodes[0].calls == [] and nodes[0].model_lists == 0


async def test_many_jobs_at_once_stay_within_the_capacity_of_the_nodes(
    house: House, nodes: tuple[FakeNode, FakeNode]
) -> None:
    house.start(
        run_relay, node_id="r1", relay_first_byte_ms=10_000, relay_idle_ms=10_000
    )  # a slow test machine is no node error
    await house.register("a", nodes[0].url, capacity=3)
    await house.register("b", nodes[1].url, capacity=3)

    handles = [await house.chat(prompt=f"job {number}") for number in range(60)]
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, *(sum(not call.over.is_set() for call in node.calls) for node in nodes))
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(text_of(handle) for handle in handles))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching

    assert [text for text, _ in answers] == [expected(prompt=f"job {number}") for number in range(60)]
    assert most == 3


async def test_beats_of_the_owner_keep_the_node_alive(
    house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    await house.register("a", nodes[0].url)
    before = (await house.view("a")).last_beat_ms

    await house.cell.publish_node_event(HttpBeat(NodeId("a"), "key"))

    async def has_beaten() -> bool:
        return (await house.view("a")).last_beat_ms > before

    await wait_until(has_beaten)


async def test_a_relay_serves_the_nodes_of_all_cells(server: ValkeyServer, nodes: tuple[FakeNode, FakeNode]) -> None:
    async with open_house(server, cells=3) as house:
        house.start(run_relay, node_id="r1")
        assert house.cell.cell != 0, "or this test shows nothing"
        await house.register("a", nodes[0].url)

        assert (await text_of(await house.chat()))[0] == expected()


async def test_after_a_flush_a_node_registers_again_and_is_served(
    server: ValkeyServer, house: House, relay: ParentLine, nodes: tuple[FakeNode, FakeNode]
) -> None:
    await house.register("a", nodes[0].url)
    await text_of(await house.chat())

    server.call("FLUSHALL")
    await asyncio.sleep(1.5)  # a look or two without any node
    assert await house.cell.node_names() == []
    assert await house.cell.link.send("EXISTS", house.cell.keys.node(NodeId("a"))) == 0, "and nobody recreates it"
    await house.register("a", nodes[1].url)

    assert (await text_of(await house.chat()))[0] == expected()
    assert nodes[1].calls


@pytest.mark.slow
async def test_a_server_that_is_killed_and_comes_back_costs_no_answer(
    own_server: ValkeyServer, nodes: tuple[FakeNode, FakeNode]
) -> None:
    async with open_house(own_server) as house:
        house.start(run_relay, node_id="r1")
        nodes[0].turn(delay_ms=50)
        await house.register("a", nodes[0].url)
        await asyncio.sleep(1.2)  # AOF everysec
        handle = await house.chat(max_tokens=40)
        await wait_until(lambda: nodes[0].calls and nodes[0].calls[0].tokens_sent > 5)

        own_server.kill()
        own_server.start()

        text, finished = await text_of(handle, timeout_s=30)
        assert text == expected(40) and finished.ended.state == "done"


async def test_a_node_that_was_forgotten_leaves_no_key_behind(server: ValkeyServer) -> None:
    """The relay reads its stream while the sweep removes it; a stream that is made again would stay for ever."""
    short = {"node_ttl_ms": 600, "node_keep_ms": 900, "beat_ms": 100}
    async with open_house(server, **short) as house, FakeNode() as node:
        house.start(run_relay, node_id="r1")
        await house.register("a", node.url)
        key = house.cell.keys.node_jobs(NodeId("a"))
        await wait_until(lambda: house.cell.link.send("EXISTS", key))

        async def is_forgotten() -> bool:
            return await house.cell.node(NodeId("a")) is None

        await wait_until(is_forgotten, timeout_s=8)
        await asyncio.sleep(1.2)

        left = await house.cell.link.send("KEYS", f"{house.cell.keys.prefix}*node:a*")
        assert left == []
