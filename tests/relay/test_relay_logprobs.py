"""Log probabilities of HTTP nodes through the whole house: relay, scripts, caller; also when the node is lost."""

from typing import Any

import pytest

from bus.calls.handle import Finished, JobHandle, TextDelta
from bus.codec.logprobs import TokenLogprobs
from bus.jobs import ChatJob, Message
from gpu_worker import answer_log
from tests.harness.fake_openai import FakeNode, Knobs
from tests.relay.test_relay_service import MODEL, PROMPT, House, expected, house, relay

__all__ = ["house", "relay"]  # fixtures
pytestmark = pytest.mark.usefixtures("relay")


async def ask(house: House, **job: Any) -> JobHandle:
    fields: dict[str, Any] = {"max_tokens": 12, "stream": True, "logprobs": 1} | job
    return await house.caller.submit(ChatJob(model=MODEL, messages=(Message("user", PROMPT),), **fields))


async def read(handle: JobHandle) -> tuple[bytes, list[TokenLogprobs], Finished]:
    text = b""
    found: list[TokenLogprobs] = []
    async for event in handle:
        if isinstance(event, TextDelta):
            text += event.text
            found += event.logprobs or ()
        elif isinstance(event, Finished):
            return text, found, event
    raise AssertionError("no end")


@pytest.mark.parametrize("stream", [True, False])
async def test_they_come_from_the_node_to_the_caller(house: House, stream: bool) -> None:
    async with FakeNode(Knobs(logprobs=True)) as node:
        await house.register("n1", node.url)

        text, found, end = await read(handle := await ask(house, stream=stream))

    assert end.ended.state == "done"
    assert text.decode() == expected()
    assert b"".join(one.chosen.token for one in found) == text
    assert handle.logprobs() == tuple(found)


async def test_another_node_goes_on_behind_what_was_shown(house: House) -> None:
    """It says the text again, and its records begin where that ended: none twice, none left out."""
    async with (
        FakeNode(Knobs(logprobs=True, break_at=5, delay_ms=20)) as broken,
        FakeNode(Knobs(logprobs=True)) as whole,
    ):
        await house.register("n1", broken.url)
        handle = await ask(house)
        await handle.next(5)
        await house.register("n2", whole.url)

        text, found, end = await read(handle)

    assert end.ended.state == "done"
    assert expected().encode().endswith(text)
    everything = handle.logprobs() or ()
    assert b"".join(one.chosen.token for one in everything).decode() == expected()
    assert list(everything)[-len(found) :] == found


async def test_an_answer_with_more_than_it_may_have_ends_by_name(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "ANSWER_BYTES_MAX", 200)
    async with FakeNode(Knobs(logprobs=True, delay_ms=10)) as node:
        await house.register("n1", node.url)

        _, _, end = await read(await ask(house, max_tokens=200))

    assert (end.ended.state, end.ended.error_code) == ("failed", "bad_request")
    assert "log probabilities" in end.ended.error_message
