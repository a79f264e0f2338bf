"""A refused request is the client's fault, unless the node refuses everything; then the job has a chance elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from bus.address_guard import AddressPolicy, guarded_session
from bus.ids import JobId, ModelName, NodeId
from bus.jobs import ChatJob, Message
from gpu_worker.engine import End, GenerateRequest
from gpu_worker.relay_engine.call import RelayLimits
from gpu_worker.relay_engine.engine import RelayEngine, RelayNode
from gpu_worker.relay_engine.refusals import REMEMBERED_MAX, ROW_MAX, Refusals

LIMITS = RelayLimits(connect_s=0.5, first_byte_s=0.5, idle_s=0.3, total_s=30.0)
MODELS = b'{"object": "list", "data": [{"id": "fake", "owned_by": "fake"}]}'


def job(number: int) -> JobId:
    return JobId(f"c0-{number}")


def test_a_node_that_has_answered_nothing_yet_is_to_blame_for_each_job_once():
    """The job that comes back has been nowhere else: its client hears the node's words."""
    refusals = Refusals()

    assert [refusals.refuse(job(1)), refusals.refuse(job(2))] == [True, True]
    assert [refusals.refuse(job(1)), refusals.refuse(job(2))] == [False, False]


def test_a_node_that_answers_is_to_blame_only_after_several_refusals_in_a_row():
    refusals = Refusals()
    refusals.answer()

    assert [refusals.refuse(job(number)) for number in range(ROW_MAX + 1)] == [False] * ROW_MAX + [True]
    refusals.answer()
    assert not refusals.refuse(job(100))


def test_what_is_remembered_of_refused_jobs_is_bounded():
    refusals = Refusals()
    for number in range(REMEMBERED_MAX + 10):
        refusals.refuse(job(number))

    assert refusals.refuse(job(0)), "forgotten"
    assert not refusals.refuse(job(REMEMBERED_MAX))


@contextlib.asynccontextmanager
async def stuck_node(head: bytes) -> AsyncIterator[str]:
    """Lists its models, and begins each answer with `head` and never goes on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        if asked.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(MODELS) + MODELS)
        else:
            writer.write(head + b"Content-Length: 100\r\n\r\n{")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", "node_silent"),
        (b"HTTP/1.1 500 Oops\r\nContent-Type: application/json\r\n", "node_error"),
    ],
)
async def test_a_body_that_never_ends_holds_its_job_no_longer_than_a_pause_in_a_stream(head: bytes, said: str) -> None:
    """Its headers were the first byte; without a bound on what follows it would hold the slot for ten minutes."""
    async with (
        stuck_node(head) as url,
        guarded_session(AddressPolicy.parse("127.0.0.0/8"), connections_max=0) as session,
    ):
        engine = RelayEngine(RelayNode(NodeId("n"), url, ("fake",), capacity=4), session, LIMITS)
        await engine.start()
        chat = ChatJob(ModelName("fake"), messages=(Message("user", "hi"),), max_tokens=4, stream=True)
        engine.submit(GenerateRequest("c0-1/1.a", chat, seed=7))

        end = await asyncio.wait_for(_first_end(engine), 3)

        assert (end.error_code, end.fault) == (said, "node")
        await engine.close()


async def _first_end(engine: RelayEngine) -> End:
    async for batch in engine.batches():
        for piece in batch:
            if piece.end is not None:
                return piece.end
    raise AssertionError("no end")
