"""How answers end, and what is said while they last."""

from pathlib import Path

import pytest

from bus.jobs import Message, Sampling
from gpu_worker.engine import End, GenerateRequest
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.prompt import Answer, prepare
from tests.torch_engine.slot_model import slot_engine
from tests.torch_engine.tiny import (
    Outcome,
    deliver,
    embedding_of,
    request,
    run,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)


def end_of(outcome: Outcome) -> End:
    assert outcome.end is not None
    return outcome.end


def test_an_answer_ends_at_max_tokens_with_length(engine: Assembled) -> None:
    outcome = run(engine, [request("a", "hello", max_tokens=9)])["a"]

    assert end_of(outcome).reason == "length"
    assert end_of(outcome).new_tokens == len(outcome.tokens) == 9
    assert end_of(outcome).prompt_tokens == len(
        engine.text.encode(engine.text.render((Message("user", "hello"),)), special=False)
    )


def test_an_answer_ends_at_the_end_token_which_is_no_part_of_it(model_dir: Path, tmp_path: Path) -> None:
    free = run(tiny_engine(model_dir), [request("a", "hello")])["a"]
    likely = free.tokens[5]
    ending = tiny_engine(tiny_model(tmp_path, eos_token_id=likely))

    outcome = run(ending, [request("a", "hello", ignore_eos=False)])["a"]
    ignoring = run(ending, [request("a", "hello", ignore_eos=True)])["a"]

    assert end_of(outcome).reason == "stop"
    assert outcome.tokens == free.tokens[: free.tokens.index(likely)]
    assert ignoring.tokens == free.tokens


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: Assembled) -> None:
    free = run(engine, [request("a", "hello", max_tokens=40)])["a"].text.decode()
    stop = free[10:13]

    outcome = run(engine, [request("a", "hello", max_tokens=40, stop=(stop,))])["a"]

    assert end_of(outcome).reason == "stop"
    assert outcome.text.decode() == free[: free.index(stop)]


def test_the_context_is_the_end_when_nothing_else_is(model_dir: Path) -> None:
    engine = tiny_engine(model_dir, kv_tokens=64)

    outcome = run(engine, [request("a", "hello", max_tokens=None)])["a"]

    assert end_of(outcome).reason == "length"
    assert end_of(outcome).prompt_tokens + end_of(outcome).new_tokens == 64


def test_a_prompt_beyond_the_context_is_refused_in_openais_words(model_dir: Path) -> None:
    engine = tiny_engine(model_dir, kv_tokens=64)

    end = end_of(run(engine, [request("a", "word " * 60)])["a"])

    assert (end.reason, end.error_code, end.fault) == ("error", "context_length_exceeded", "client")
    assert end.error_message.startswith(
        "This model's maximum context length is 64 tokens. However, your messages resulted in "
    )


def test_a_hopeless_prompt_is_refused_unread(engine: Assembled) -> None:
    """Eight million bytes cannot fit; tokenising them to learn that would take seconds."""
    end = end_of(run(engine, [request("a", "x" * 8_000_000)])["a"])

    assert end.error_code == "context_length_exceeded"
    assert "at least" in end.error_message


def test_a_cancelled_answer_ends_within_a_step_and_frees_its_blocks(engine: Assembled) -> None:
    outcomes = run(engine, [request("a", "one", max_tokens=500), request("b", "two")], cancel_at={"a": 3})

    assert end_of(outcomes["a"]).reason == "cancelled"
    assert len(outcomes["a"].tokens) == 3
    assert end_of(outcomes["b"]).reason == "length"
    assert engine.core.scheduler.pool.free == engine.core.scheduler.pool.total


def test_an_unknown_cancel_is_ignored(engine: Assembled) -> None:
    assert engine.core.cancel("nobody") == []


def test_a_lone_surrogate_is_the_clients_error(engine: Assembled) -> None:
    end = end_of(run(engine, [request("a", "\ud800")])["a"])

    assert (end.error_code, end.fault) == ("bad_request", "client")


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_logits_that_are_not_finite_are_the_nodes_error(kernels: str, tmp_path: Path) -> None:
    """Another node may do better, and the neighbours in the batch go on."""
    engine = tiny_engine(tiny_model(tmp_path), kernels=kernels)
    embedding = embedding_of(engine)
    poison = engine.text.encode("Q", special=False)[0]
    embedding[poison] = float("nan")

    outcomes = run(engine, [request("bad", "Q"), request("good", "hello")])

    assert (end_of(outcomes["bad"]).error_code, end_of(outcomes["bad"]).fault) == ("node_error", "node")
    assert end_of(outcomes["good"]).reason == "length"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_stop_string_that_only_the_last_tail_completes_is_a_stop(engine: Assembled, resumed: bool) -> None:
    """At max_tokens half a character is left over. It becomes U+FFFD, and that may be what a stop string waits for."""
    half = engine.text.encode("\u00e9", special=False)[0]
    always = Sampling(temperature=0.0, logit_bias=((half, 100.0),))
    forced = (half,) if resumed else ()

    def ended(*stops: str) -> tuple[str, bytes]:
        wanted = request("a", "hello", max_tokens=1, stop=stops, sampling=always, forced=forced)
        outcome = run(engine, [wanted])["a"]
        assert outcome.tokens == [half]
        return end_of(outcome).reason, outcome.text

    assert ended("\ufffd") == ("stop", b"")
    assert ended("\ufffdx") == ("length", "\ufffd".encode())


def test_a_forced_prefix_that_is_the_whole_answer_ends_at_once(engine: Assembled) -> None:
    whole = run(engine, [request("a", "hello", max_tokens=12)])["a"]

    resumed = run(engine, [request("a", "hello", max_tokens=12, forced=whole.tokens)])["a"]

    assert end_of(resumed).reason == "length"
    assert resumed.text == whole.text


def test_a_forced_prefix_that_holds_the_stop_string_ends_at_once(engine: Assembled) -> None:
    whole = run(engine, [request("a", "hello", max_tokens=40)])["a"]
    stop = whole.text.decode()[10:13]
    stopped = run(engine, [request("a", "hello", max_tokens=40, stop=(stop,))])["a"]

    resumed = run(engine, [request("a", "hello", max_tokens=40, stop=(stop,), forced=stopped.tokens)])["a"]

    assert end_of(resumed).reason == "stop"
    assert resumed.text == stopped.text


def test_a_forced_text_is_tokenised_again_and_carries_no_token_ids(engine: Assembled) -> None:
    """An engine of another digest, or a relay, wrote it: its ids mean nothing here, and ours would not fit its text."""
    shown = b"the river and "

    outcome = run(engine, [request("a", "hello", max_tokens=20, shown=shown)])["a"]

    assert outcome.text.startswith(shown)
    assert outcome.tokens == []
    assert outcome.pieces[0].text_offset == len(shown)
    assert end_of(outcome).new_tokens == 20


def test_a_stop_string_that_begins_in_a_forced_text_stops_the_answer(engine: Assembled) -> None:
    """A relay's server may show the beginning of a stop string before it knows."""
    ending = tiny_tokenizer().encode("D").ids[0]
    sampling = Sampling(temperature=0.0, logit_bias=((ending, 100.0),))

    outcome = run(engine, [request("a", "hi", shown=b"the EN", stop=("END",), sampling=sampling)])["a"]

    assert (outcome.text, end_of(outcome).reason) == (b"the EN", "stop")


def test_tokens_that_do_not_spell_the_shown_text_end_interrupted(engine: Assembled) -> None:
    end = end_of(run(engine, [request("a", "hello", forced=[5, 6], shown=b"something else")])["a"])

    assert (end.error_code, end.fault) == ("interrupted", "node")


def test_a_stored_text_that_ends_within_a_character_ends_interrupted(engine: Assembled) -> None:
    """Whoever stored it: the thread that reads it goes on."""
    tokens = engine.text.encode("é", special=False)

    end = end_of(run(engine, [request("a", "hello", forced=tokens, shown="é".encode()[:1])])["a"])

    assert (end.error_code, end.fault) == ("interrupted", "node")


def test_a_stored_token_that_the_model_does_not_have_ends_interrupted(engine: Assembled) -> None:
    """It would be looked up beyond the embedding, and take all neighbours of the batch with it."""
    end = end_of(run(engine, [request("a", "hello", forced=[5, 10**6])])["a"])

    assert (end.error_code, end.fault) == ("interrupted", "node")


def test_a_prompt_token_without_an_embedding_is_the_clients_error(tmp_path: Path) -> None:
    """Tokenizers may know more special tokens than the model was built with."""
    directory = tiny_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(str(directory / "tokenizer.json"))

    end = end_of(run(tiny_engine(directory), [request("a", "one <|extra|>")])["a"])

    assert (end.error_code, end.fault) == ("bad_request", "client")


def test_the_template_may_refuse(engine: Assembled, tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('only users may speak') }}")

    end = end_of(run(tiny_engine(directory), [request("a", "hello")])["a"])

    assert (end.error_code, end.fault, end.error_message) == ("bad_request", "client", "only users may speak")


def test_a_template_cannot_reach_the_machine(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")

    end = end_of(run(tiny_engine(directory), [request("a", "hello")])["a"])

    assert end.error_code == "bad_request"


def test_a_raw_prompt_is_continued_as_it_stands(engine: Assembled) -> None:
    end = end_of(run(engine, [request("a", "", messages=(), prompt="the river")])["a"])

    assert end.prompt_tokens == len(engine.text.encode("the river", special=False))


def test_load_says_what_runs_waits_and_is_free(model_dir: Path) -> None:
    engine = tiny_engine(model_dir, capacity=2, kv_tokens=2048)
    outcomes: dict[str, Outcome] = {}

    for name in "abc":
        wanted = request(name, "hello")
        outcomes[name] = Outcome(wanted)
        answer = prepare(wanted, engine.text, context_max=engine.context)
        assert isinstance(answer, Answer)
        engine.core.add(answer)
    deliver(engine.core.step().pieces, outcomes)

    load = engine.core.load(arriving=1)

    assert (load.running, load.waiting, load.idle, load.total_blocks) == (2, 2, False, 64)
    assert load.free_blocks < 64


@pytest.mark.parametrize("came_later", [True, False])
def test_an_answer_that_has_just_begun_waits_for_no_prompt_that_came_later(model_dir: Path, came_later: bool) -> None:
    engine = slot_engine(model_dir, block_tokens=16, chunk_max=512, row_s=0.001)
    core = engine.core
    for warm_up in ("x", "y"):
        run(engine, [request(warm_up, "p" * 300, max_tokens=20)])
    long, begun = request("long", "p" * 1500, max_tokens=1), request("begun", "hello", max_tokens=200)

    core.add(prepared(engine, begun))
    if came_later:
        for _ in range(6):
            core.step()
        core.add(prepared(engine, long))
    else:
        core.add(prepared(engine, long))
        core.step()
    gaps: list[float] = []
    last_s = core.last_progress_s
    while len(gaps) < 8:
        if any(piece.sequence == "begun" for piece in core.step().pieces):
            gaps.append(core.last_progress_s - last_s)
            last_s = core.last_progress_s
    assert (max(gaps) < 0.05) == came_later  # its own interval is 11 ms


def prepared(engine: Assembled, asked: GenerateRequest) -> Answer:
    answer = prepare(asked, engine.text, context_max=engine.context)
    assert isinstance(answer, Answer)
    return answer
