"""The engine over a real HTTP node that misbehaves in every way: each sequence gets exactly one end, and soon."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from bus.address_guard import AddressPolicy, guarded_session
from bus.ids import ModelName, NodeId
from bus.jobs import ChatJob, Message, Sampling
from gpu_worker.engine import End, GenerateRequest, Piece
from gpu_worker.relay_engine.call import RelayLimits
from gpu_worker.relay_engine.engine import RelayEngine, RelayNode
from tests.harness.fake_openai import FakeNode, Knobs, answer_text

LIMITS = RelayLimits(connect_s=0.5, first_byte_s=0.8, idle_s=0.6, total_s=5.0)
PROMPT = "Tell me about mills"


@dataclasses.dataclass
class Result:
    text: bytes
    end: End
    pieces: list[Piece]


class Bench:
    """One engine over one node, and a collector that holds the engine to its contract."""

    def __init__(self, engine: RelayEngine) -> None:
        self.engine = engine
        self.pieces: dict[str, list[Piece]] = {}
        self.changed = asyncio.Condition()

    async def collect(self) -> None:
        async for batch in self.engine.batches():
            keys = [piece.sequence for piece in batch]
            assert len(keys) == len(set(keys)), "at most one piece a sequence in a batch"
            async with self.changed:
                for piece in batch:
                    self.pieces.setdefault(piece.sequence, []).append(piece)
                self.changed.notify_all()

    def submit(self, sequence: str = "s", shown: bytes = b"", **job: Any) -> None:
        fields: dict[str, Any] = {"model": ModelName("fake"), "messages": (Message("user", PROMPT),), "max_tokens": 12}
        fields["stream"] = True
        request = GenerateRequest(sequence, ChatJob(**fields | job), seed=7, forced_text=shown)
        self.pieces[sequence] = []
        self.engine.submit(request)

    async def text_so_far(self, sequence: str, size: int) -> bytes:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: sum(len(one.text) for one in self.pieces[sequence]) >= size)
        return b"".join(one.text for one in self.pieces[sequence])

    async def result(self, sequence: str = "s", shown: bytes = b"") -> Result:
        async with asyncio.timeout(8), self.changed:
            await self.changed.wait_for(lambda: any(one.end for one in self.pieces[sequence]))
        pieces = self.pieces[sequence]
        ends = [one.end for one in pieces if one.end is not None]
        assert len(ends) == 1 and pieces[-1].end is not None, "exactly one end, and nothing after it"
        text = b""
        for piece in pieces:
            assert piece.text_offset == len(shown) + len(text), "no hole, no repeat"
            piece.text.decode()
            text += piece.text
        return Result(text, ends[0], pieces)

    async def run(self, shown: bytes = b"", **job: Any) -> Result:
        self.submit("s", shown, **job)
        return await self.result("s", shown)


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    async with FakeNode(Knobs()) as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with guarded_session(AddressPolicy.parse("127.0.0.0/8"), connections_max=0) as opened:
        yield opened


@pytest.fixture
async def bench(node: FakeNode, session: aiohttp.ClientSession) -> AsyncIterator[Bench]:
    engine = RelayEngine(RelayNode(NodeId("n"), node.url, ("fake",), capacity=4), session, LIMITS)
    info = await engine.start()
    assert info.kind == "http" and info.resume_digest == ""
    made = Bench(engine)
    collector = asyncio.create_task(made.collect())
    yield made
    await engine.close()
    async with asyncio.timeout(2):
        await collector


def expected(tokens: int = 12) -> bytes:
    return answer_text(PROMPT, tokens).encode()


async def test_an_answer_is_streamed_with_the_nodes_own_usage(bench: Bench, node: FakeNode) -> None:
    node.turn(delay_ms=5)

    result = await bench.run()

    assert result.text == expected()
    assert result.end == End("length", prompt_tokens=4, new_tokens=12)
    assert len(result.pieces) > 3


@pytest.mark.parametrize(
    "knobs",
    [{"crlf": True}, {"chop": 1}, {"chop": 7, "crlf": True}, {"no_done": True}, {"no_finish": True}, {"usage": False}],
    ids=str,
)
async def test_the_manners_of_servers_do_not_matter(bench: Bench, node: FakeNode, knobs: dict[str, Any]) -> None:
    node.turn(**knobs)

    result = await bench.run()

    assert result.text == expected()
    assert result.end.reason in ("length", "stop") and result.end.new_tokens == 12


async def test_sampling_and_stop_reach_the_node(bench: Bench, node: FakeNode) -> None:
    await bench.run(sampling=Sampling(temperature=0.5, top_k=3), stop=("\n",))

    body = node.calls[0].body
    assert (body["temperature"], body["top_k"], body["seed"], body["stop"]) == (0.5, 3, 7, ["\n"])


@pytest.mark.parametrize("ignores", [False, True])
async def test_stop_strings_never_leak_even_if_the_node_ignores_them(
    bench: Bench, node: FakeNode, ignores: bool
) -> None:
    node.turn(answer="one two STOP three", ignores_stop=ignores, delay_ms=2)

    result = await bench.run(stop=("STOP",))

    assert result.text == b"one two " and result.end.reason == "stop"


async def test_a_simple_node_is_detected_and_asked_in_its_own_way(bench: Bench, node: FakeNode) -> None:
    node.turn(mode="simple")

    first, second = await bench.run(), await bench.run()

    assert first.text == second.text == expected()
    assert first.end.reason == "stop" and first.end.new_tokens > 0
    assert node.calls[0].path == "/chat" and node.calls[0].body["max_new_tokens"] == 12
    assert node.model_lists == 1, "detected once"


async def test_an_openai_node_without_a_list_of_models_is_found_by_asking_it(bench: Bench, node: FakeNode) -> None:
    node.turn(no_models=True)

    result = await bench.run()

    assert result.text == expected()


async def test_a_node_that_changed_its_api_is_detected_again_after_an_error(bench: Bench, node: FakeNode) -> None:
    await bench.run()
    node.turn(mode="simple")

    failed, worked = await bench.run(), await bench.run()

    assert failed.end.fault == "node"
    assert worked.text == expected()


# --- trouble --------------------------------------------------------------------------------------------------------

NODE_TROUBLE: list[dict[str, Any]] = [
    {"silent": True},
    {"refuse": True},
    {"status": 500},
    {"status": 503},
    {"status": 429},
    {"status": 401},
    {"status": 404},
    {"models_status": 500},
    {"models_status": 401},
    {"redirect_to": "http://169.254.169.254/"},
    {"silent_at": 0},
    {"silent_at": 3},
    {"break_at": 0},
    {"break_at": 3},
    {"error_at": 3},
    {"garbage_at": 3},
    {"end_at": 0},
    {"end_at": 3},
    {"mode": "simple", "silent": True},
    {"mode": "simple", "refuse": True},
    {"mode": "simple", "status": 500},
    {"mode": "simple", "garbage_at": 0},
    {"mode": "simple", "huge": True},
]


@pytest.mark.parametrize("knobs", NODE_TROUBLE, ids=str)
async def test_whatever_a_node_does_the_job_goes_back_as_the_nodes_fault_within_the_bounds(
    bench: Bench, node: FakeNode, knobs: dict[str, Any]
) -> None:
    node.turn(delay_ms=1, **knobs)
    began = time.monotonic()

    result = await bench.run(max_tokens=6)

    assert (result.end.reason, result.end.fault) == ("error", "node")
    assert result.end.error_message.isprintable() and result.end.error_code in ("node_error", "node_silent")
    assert expected().startswith(result.text), "what came before the trouble is the truth"
    assert time.monotonic() - began < 3


async def test_what_was_said_before_the_trouble_is_published(bench: Bench, node: FakeNode) -> None:
    node.turn(end_at=5, delay_ms=2)

    assert (await bench.run()).text == expected(5)


@pytest.mark.parametrize("continues", [True, False])
async def test_text_that_nobody_reads_yet_is_kept_if_another_node_could_only_say_it_again(
    bench: Bench, node: FakeNode, continues: bool
) -> None:
    """So a whole answer never ends as `interrupted` because its first node was lost."""
    node.turn(end_at=5, delay_ms=2, owned_by="vllm" if continues else "fake")

    assert (await bench.run(stream=False)).text == (expected(5) if continues else b"")
    node.turn(end_at=None)
    assert (await bench.run(stream=False)).text == expected()


async def test_a_node_that_only_pings_is_silent(bench: Bench, node: FakeNode) -> None:
    node.turn(pings=True)
    began = time.monotonic()

    assert (await bench.run()).end.error_code == "node_silent"
    assert time.monotonic() - began < 2.5


async def test_a_node_that_is_not_there_is_the_nodes_fault(bench: Bench, node: FakeNode) -> None:
    await node.stop()

    result = await bench.run()

    assert result.end.fault == "node" and "no connection" in result.end.error_message


async def test_an_endless_answer_is_cut(bench: Bench, node: FakeNode) -> None:
    node.turn(huge=True)

    result = await bench.run()

    assert result.end.reason == "length" and len(result.text) <= 12 * 64


async def test_a_request_that_the_node_refuses_is_the_clients_fault_with_the_nodes_words(
    bench: Bench, node: FakeNode
) -> None:
    await bench.run()  # it has shown that it can answer
    node.turn(status=400, error_message="top_p is\nwrong \x1b[31m")

    end = (await bench.run()).end

    assert (end.fault, end.error_code, end.error_message) == ("client", "bad_request", "top_p is wrong [31m")


async def test_a_prompt_beyond_the_context_is_named_as_such(bench: Bench, node: FakeNode) -> None:
    node.turn(context_length=2)

    end = (await bench.run()).end

    assert (end.fault, end.error_code, end.outgrown) == ("client", "context_length_exceeded", True)
    assert "maximum context length is 2 tokens" in end.error_message


async def test_a_black_hole_holds_each_job_no_longer_than_its_bound(bench: Bench, node: FakeNode) -> None:
    """Also when more jobs arrive than it may run, and all at once."""
    node.turn(silent=True)
    began = time.monotonic()
    for number in range(8):
        bench.submit(f"s{number}")

    ends = [(await bench.result(f"s{number}")).end for number in range(8)]

    assert {end.fault for end in ends} == {"node"}
    assert time.monotonic() - began < 3 * LIMITS.first_byte_s + 1
    assert bench.engine.load().idle


async def test_no_more_calls_than_the_nodes_capacity_are_open(bench: Bench, node: FakeNode) -> None:
    node.turn(delay_ms=10)
    for number in range(8):
        bench.submit(f"s{number}")
    await bench.text_so_far("s0", 1)

    load = bench.engine.load()

    assert (load.running, load.waiting, load.capacity) == (4, 4, 4)
    for number in range(8):
        assert (await bench.result(f"s{number}")).text == expected()


async def test_a_cancelled_sequence_ends_and_its_call_is_closed(bench: Bench, node: FakeNode) -> None:
    node.turn(delay_ms=20)
    bench.submit(max_tokens=500)
    await bench.text_so_far("s", 10)

    bench.engine.cancel("s")
    bench.engine.cancel("s")
    bench.engine.cancel("unknown")

    assert (await bench.result()).end.reason == "cancelled"
    async with asyncio.timeout(2):
        await node.calls[0].over.wait()
    assert node.calls[0].aborted


async def test_a_sequence_cancelled_before_its_first_step_still_ends(bench: Bench) -> None:
    bench.submit()
    bench.engine.cancel("s")

    assert (await bench.result()).end.reason == "cancelled"


async def test_close_breaks_off_what_runs(bench: Bench, node: FakeNode) -> None:
    node.turn(silent_at=2)
    bench.submit()
    await bench.text_so_far("s", 3)

    async with asyncio.timeout(1):
        await bench.engine.close()


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 11])
async def test_a_node_that_can_continue_gets_the_text_so_far_and_adds_only_what_is_new(
    bench: Bench, node: FakeNode, tokens: int
) -> None:
    node.turn(owned_by="vllm", continues=True)
    shown = expected(tokens)

    result = await bench.run(shown=shown)

    assert shown + result.text == expected()
    assert node.calls[0].body["messages"][-1]["content"] == shown.decode()
    assert node.calls[0].body["max_tokens"] == 12 - tokens
    assert result.end.new_tokens == 12


async def test_a_node_that_cannot_continue_says_it_again_and_only_new_text_is_published(
    bench: Bench, node: FakeNode
) -> None:
    shown = expected(5)

    result = await bench.run(shown=shown)

    assert shown + result.text == expected()
    assert node.calls[0].body["messages"][-1]["role"] == "user"


async def test_a_simple_node_resumes_too(bench: Bench, node: FakeNode) -> None:
    node.turn(mode="simple")

    assert expected(5) + (await bench.run(shown=expected(5))).text == expected()


async def test_a_raw_prompt_is_continued_by_every_openai_node(bench: Bench, node: FakeNode) -> None:
    whole = await bench.run(messages=(), prompt="a raw prompt\n")
    shown = whole.text[:20]

    result = await bench.run(shown=shown, messages=(), prompt="a raw prompt\n", max_tokens=None)

    assert (shown + result.text).startswith(whole.text[:40])
    assert node.calls[-1].path == "/v1/completions" and node.calls[-1].body["prompt"].endswith(shown.decode())


async def test_different_words_after_a_resume_interrupt_and_are_never_shown(bench: Bench, node: FakeNode) -> None:
    node.turn(answer="something quite different from what was said before by another")

    result = await bench.run(shown=expected(3))

    assert result.text == b""
    assert (result.end.reason, result.end.error_code, result.end.fault) == ("error", "interrupted", "")


async def test_a_node_that_refuses_to_continue_is_asked_to_say_it_again(bench: Bench, node: FakeNode) -> None:
    node.turn(owned_by="llamacpp")  # this fake has no /apply-template

    shown = expected(5)

    assert shown + (await bench.run(shown=shown)).text == expected()


async def test_an_answer_that_had_all_its_tokens_already_just_ends(bench: Bench, node: FakeNode) -> None:
    node.turn(owned_by="vllm", continues=True)

    result = await bench.run(shown=expected(12))

    assert (result.text, result.end.reason) == (b"", "length")
    assert node.calls == []


# Silence takes its bound each time: at every token in the slow suite, at three of them in the quick one.
BREAKS = [pytest.param(how, at, id=f"{how}-{at}") for how in ("break_at", "error_at", "end_at") for at in range(13)] + [
    pytest.param("silent_at", at, id=f"silent_at-{at}", marks=[] if at in (0, 5, 12) else [pytest.mark.slow])
    for at in range(13)
]


@pytest.mark.parametrize(("how", "at"), BREAKS)
@pytest.mark.parametrize("continues", [True, False])
async def test_wherever_a_stream_stops_another_attempt_completes_the_same_text(
    bench: Bench, node: FakeNode, at: int, how: str, continues: bool
) -> None:
    """Break the world at every token, not at one."""
    node.turn(**{how: at}, owned_by="vllm" if continues else "fake", continues=continues)
    first = await bench.run()
    node.turn(**{how: None})

    second = await bench.run(shown=first.text)

    assert first.text + second.text == expected()
    assert first.end.fault == "node" or at >= 12
