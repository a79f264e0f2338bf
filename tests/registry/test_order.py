"""The scripts and the fold agree: whatever the order in which news is applied, the node ends as the fold says."""

import random

import pytest

from bus.cell import Cell
from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeEvent, NodeRegistered
from bus.ids import Holder, NodeId
from bus.link import Link
from bus.settings import Settings
from registry_consumer.fold import NodeState, fold, status
from registry_consumer.news import to_news

TTL_MS = 20_000
NODE = NodeId("n")


@pytest.fixture
def cell(link: Link) -> Cell:
    return Cell(link, 0, Settings().changed(node_ttl_ms=TTL_MS, beat_ms=1_000))


def make_event(rng: random.Random, worker: bool, epoch: int) -> NodeEvent:
    """News of one node: of a worker that dials out, or of one that was registered over HTTP."""
    kind = rng.choice(["state", "state", "state", "drain", "bye"])
    if kind == "drain":
        return NodeDrain(NODE, epoch)
    if kind == "bye":
        return NodeBye(NODE, epoch, "" if worker else "k")
    if worker:
        return NodeBeat(NODE, epoch, Holder(f"n.{epoch}"), "echo", ("m",), capacity=rng.randint(1, 9))
    return NodeRegistered(NODE, epoch, "k", "http://10.0.0.1:1", ("m",), capacity=rng.randint(1, 9), layers=())


def make_news(rng: random.Random, now_ms: int) -> list[tuple[str, NodeEvent]]:
    """Up to eight entries with distinct ids, fresh and expired ones; a later epoch is never older than an earlier one.

    An epoch has one registration: it is its lock's token.
    """
    worker = rng.random() < 0.5
    ages_ms = sorted((rng.choice([100, 3_000, TTL_MS + 5_000, 10 * TTL_MS]) for _ in range(3)), reverse=True)
    news: list[tuple[str, NodeEvent]] = []
    registered: set[int] = set()
    for seq in range(rng.randint(1, 8)):
        epoch = rng.randint(1, 3)
        event = make_event(rng, worker, epoch)
        if isinstance(event, NodeRegistered):
            if epoch in registered:
                continue
            registered.add(epoch)
        news.append((f"{now_ms - ages_ms[epoch - 1]}-{10 * epoch + seq}", event))
    return news


@pytest.mark.parametrize("seed", range(60))
async def test_any_order_of_application_ends_as_the_fold_says(cell: Cell, seed: int) -> None:
    rng = random.Random(seed)
    seconds, micros = await cell.link.send("TIME")
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    news = make_news(rng, now_ms)
    state = NodeState()
    for entry_id, event in news:
        state = fold(state, to_news(entry_id, event))
    expected = status(state, now_ms, TTL_MS)

    for _ in range(3):
        rng.shuffle(news)
        await cell.link.send("FLUSHALL")
        for one in news:
            await cell.apply_events([one])
        if rng.random() < 0.5:
            await cell.apply_events(news)  # delivered twice
        view = await cell.node(NODE)

        assert (view is not None and view.alive) == (expected == "active"), (expected, news, view)
        if view is not None and view.alive:
            assert view.epoch == state.epoch, (news, view)


async def test_an_http_beat_after_a_registration_extends_it_by_its_own_entry_id(cell: Cell) -> None:
    seconds, _ = await cell.link.send("TIME")
    now_ms = int(seconds) * 1000
    registered = NodeRegistered(NODE, 1, "k", "http://10.0.0.1:1", ("m",), layers=())

    await cell.apply_events([(f"{now_ms - TTL_MS + 1_500}-0", registered)])
    await cell.apply_events([(f"{now_ms - 5_000}-0", HttpBeat(NODE, "k"))])
    await cell.apply_events([(f"{now_ms - 9_000}-0", HttpBeat(NODE, "k"))])

    left_ms = await cell.link.send("PTTL", cell.keys.node_alive(NODE))
    assert TTL_MS - 8_000 < left_ms <= TTL_MS - 4_000
