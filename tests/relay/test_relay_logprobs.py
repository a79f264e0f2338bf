"""Log probabilities of HTTP nodes through the whole house: relay, scripts, caller; also when the node is lost."""

from typing import Any

import pytest

from bus.calls.caller import Refusal
from bus.calls.handle import Finished, JobHandle, TextDelta
from bus.codec.logprobs import TokenLogprobs
from bus.jobs import ChatJob, Message
from gpu_worker import answer_log
from tests.harness.fake_openai import FakeNode, Knobs
from tests.relay.test_relay_service import MODEL, PROMPT, House, expected, house, relay, text_of

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


async def test_in_a_mixed_fleet_the_node_that_gives_some_answers(house: House) -> None:
    """Nobody knows before it is asked which HTTP node gives them; whoever asks does not notice who does not."""
    async with FakeNode(Knobs()) as none, FakeNode(Knobs(logprobs=True)) as some:
        await house.register("n1", none.url)
        handles = [await ask(house)]
        await house.register("n2", some.url)
        handles += [await ask(house) for _ in range(5)]

        answers = [await read(handle) for handle in handles]
        plain, _ = await text_of(await house.chat())

    assert {end.ended.state for _, _, end in answers[1:]} == {"done"}
    assert {end.ended.node for _, _, end in answers[1:]} == {"n2"}
    assert all(b"".join(one.chosen.token for one in found) == text for text, found, _ in answers[1:])
    assert plain == expected()
    view = await house.view("n1")
    assert (view.failed, view.breaker_n) == (0, 0)


async def test_where_no_node_gives_any_the_answer_names_what_is_missing(house: House) -> None:
    async with FakeNode(Knobs()) as a, FakeNode(Knobs()) as b:
        await house.register("n1", a.url)
        await house.register("n2", b.url)

        _, _, end = await read(await ask(house))
        with pytest.raises(Refusal) as refused:
            await ask(house)

    assert (end.ended.state, end.ended.error_code, end.ended.attempts) == ("failed", "unsupported", 2)
    assert "logprobs" in end.ended.error_message and MODEL in end.ended.error_message
    assert refused.value.code == "unsupported"


async def test_a_node_that_stops_giving_them_is_left_for_one_that_does(house: House) -> None:
    """Its upstream has changed: it said that it gives them, and did."""
    async with FakeNode(Knobs(logprobs=True)) as changing, FakeNode(Knobs(logprobs=True, delay_ms=1)) as other:
        await house.register("n1", changing.url)
        await read(await ask(house))
        changing.turn(logprobs=False)
        await house.register("n2", other.url)

        answers = [await read(await ask(house)) for _ in range(6)]

    assert {(end.ended.state, end.ended.node) for _, _, end in answers} == {("done", "n2")}


async def test_a_node_that_refuses_in_words_is_no_broken_node_and_another_answers(house: House) -> None:
    words = "top_logprobs of this server is at most 0"
    async with FakeNode(Knobs(status=400, error_message=words)) as strict, FakeNode(Knobs(logprobs=True)) as other:
        await house.register("n1", strict.url)
        alone, _, refused = await read(await ask(house))
        await house.register("n2", other.url)

        answers = [await read(await ask(house)) for _ in range(4)]

    assert (alone, refused.ended.error_code) == (b"", "unsupported")
    assert words in refused.ended.error_message
    assert {(end.ended.state, end.ended.node) for _, _, end in answers} == {("done", "n2")}
    view = await house.view("n1")
    assert (view.failed, view.breaker_n, view.cannot) == (0, 0, ())
