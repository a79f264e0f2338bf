"""Several cells: a model and its nodes live in one, a gateway shows and serves them all."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from bus.ids import cell_of_model
from bus.settings import Settings
from tests.conftest import wait_until
from tests.gateway.conftest import MODEL, Served, quick_settings, whole_fleet
from tests.gateway.test_chatting import chunks, read_events, streamed, text_of
from tests.harness.fake_openai import FakeNode
from tests.harness.servers import ValkeyServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

CELLS = 3
HOME = cell_of_model(MODEL, CELLS)
ELSEWHERE = next(name for name in ("a", "b", "c", "d", "e") if cell_of_model(name, CELLS) != HOME)


def cells_settings(server: ValkeyServer) -> Settings:
    return quick_settings(server.url).changed(cells=CELLS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(session_server: ValkeyServer) -> AsyncIterator[tuple[Served, Served]]:
    session_server.call("FLUSHALL")
    async with whole_fleet(cells_settings(session_server)) as pair:
        yield pair


async def test_a_job_runs_in_the_cell_of_its_model(fleet: tuple[Served, Served]) -> None:
    status, headers, body = await fleet[0].chat("one two")

    assert (status, body["choices"][0]["message"]["content"]) == (200, "one two")
    assert headers["X-Job-Id"].startswith(f"c{HOME}-")


async def test_a_stream_is_resumed_on_another_gateway(fleet: tuple[Served, Served]) -> None:
    first, second = fleet
    async with streamed(first, "[[delay_ms=20 tokens=30]] a b c") as got:
        shown = await read_events(got, most=5)
        headers = {**second.headers, "Last-Event-ID": shown[-1]["id"]}
        path = f"{second.base}/v1/jobs/{got.headers['X-Job-Id']}/events"
        async with second.http.get(path, headers=headers) as resumed:
            rest = await read_events(resumed)

    assert (text_of(shown) + text_of(rest)).split() == list("abc") * 10
    assert chunks(rest)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_node_whose_model_moves_to_another_cell_is_shown_once(fleet: tuple[Served, Served]) -> None:
    first, second = fleet
    async with FakeNode() as node:
        for served, model in [(first, MODEL), (second, ELSEWHERE), (first, MODEL)]:
            body = {
                "node_id": "mover",
                "api_url": node.url,
                "capabilities": {"gpu_memory_gb": 1, "model": model, "layers": []},
            }
            status, _, answer = await served.call("POST", "/api/gpu/register", body)
            assert (status, answer.get("models")) == (200, [model]), answer

            for one in fleet:
                _, _, shown = await one.call("GET", "/api/gpu/status", headers={})
                found = [node["models"] for node in shown["nodes"] if node["node_id"] == "mover"]
                assert found == [[model]]

        async def one_home() -> bool:
            known = [await cell.node("mover") for cell in first.gateway.caller.cells]  # type: ignore[arg-type]
            return sum(node is not None and node.state != "bye" for node in known) == 1

        await wait_until(one_home)
        assert (await second.call("POST", "/api/gpu/heartbeat", "mover"))[0] == 200
