"""Log probabilities: the model's own, whatever the batch, the filters and the history of a sequence."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bus.codec.logprobs import TokenLogprobs, shown_records
from bus.jobs import Sampling
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.text_model import read_json
from tests.torch_engine.reference import reference_logits
from tests.torch_engine.slot_model import slot_engine
from tests.torch_engine.tiny import Outcome, request, run, tiny_engine

TEXTS = [f"{n} " + "mill " * (n % 5) for n in range(6)]
WARM = Sampling(temperature=0.9, top_p=0.9, top_k=40)


def log_of(outcome: Outcome) -> bytes:
    return b"".join(piece.logprobs for piece in outcome.pieces)


def logs(engine: Assembled, **job: Any) -> dict[str, bytes]:
    wanted = [request(str(n), text, seed=n, **({"logprobs": 5} | job)) for n, text in enumerate(TEXTS)]
    return {name: log_of(outcome) for name, outcome in run(engine, wanted).items()}


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> dict[str, bytes]:
    engine = tiny_engine(model_dir, prefix_cache=False)
    wanted = [request(str(n), text, seed=n, logprobs=5, sampling=WARM) for n, text in enumerate(TEXTS)]
    return {one.sequence: log_of(run(engine, [one])[one.sequence]) for one in wanted}


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), WARM, Sampling(temperature=1.5, presence_penalty=1.0)])
def test_they_are_the_log_softmax_of_the_models_own_logits(model_dir: Path, sampling: Sampling) -> None:
    """Before temperature, filters and penalties. Held to the slow form of the model, and to a plain log_softmax."""
    engine = tiny_engine(model_dir)
    outcome = run(engine, [request("a", "the mill", logprobs=20, max_tokens=12, sampling=sampling)])["a"]
    prompt = engine.text.encode(engine.text.render(request("a", "the mill").job.messages), special=False)

    records = shown_records(log_of(outcome), len(outcome.text))
    logits = reference_logits(
        read_json(model_dir / "config.json"), load_file(model_dir / "model.safetensors"), prompt + outcome.tokens
    )

    assert len(records) == len(outcome.tokens) == 12
    for row, (token, record) in enumerate(zip(outcome.tokens, records, strict=True), len(prompt) - 1):
        expected = torch.log_softmax(logits[row], -1)
        assert record.chosen.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert [one.logprob for one in record.top] == pytest.approx(expected.topk(20).values.tolist(), abs=1e-4)


def test_with_others_or_alone_they_are_the_same_bits(model_dir: Path, alone: dict[str, bytes]) -> None:
    assert logs(tiny_engine(model_dir), sampling=WARM) == alone
    assert logs(tiny_engine(model_dir, capacity=3, prefill_chunk=9), sampling=WARM) == alone


def test_preempted_again_and_again_they_are_the_same_bits(model_dir: Path) -> None:
    wanted = [request(str(n), f"{n} and on", max_tokens=90, logprobs=3) for n in range(6)]
    roomy = tiny_engine(model_dir, prefix_cache=False)
    alone = {one.sequence: log_of(run(roomy, [one])[one.sequence]) for one in wanted}
    tight = tiny_engine(model_dir, kv_tokens=320)

    assert {name: log_of(outcome) for name, outcome in run(tight, wanted).items()} == alone
    assert tight.core.scheduler.preemptions > 1


@pytest.mark.parametrize("kept", [1, 7, 16])
def test_resumed_on_another_engine_they_go_on_with_the_same_bits(
    model_dir: Path, alone: dict[str, bytes], kept: int
) -> None:
    """Nothing is said again of the forced tokens; penalties of what they were count on."""
    sampling = Sampling(temperature=0.8, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2)
    first = tiny_engine(model_dir)
    for n, text in enumerate(TEXTS[:3]):
        whole = run(first, [request("a", text, seed=n, logprobs=5, sampling=sampling)])["a"]
        shown = b"".join(p.text for p in whole.pieces if p.token_offset + len(p.tokens) <= kept)
        before = b"".join(p.logprobs for p in whole.pieces if p.token_offset + len(p.tokens) <= kept)
        again = request("a", text, seed=n, forced=whole.tokens[:kept], shown=shown, logprobs=5, sampling=sampling)

        resumed = run(tiny_engine(model_dir, prefill_chunk=11), [again])["a"]

        assert resumed.tokens == whole.tokens
        assert before + log_of(resumed) == log_of(whole)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, frequency_penalty=0.2),
        Sampling(temperature=0.7, presence_penalty=0.5, repetition_penalty=1.3),
    ],
)
def test_guessed_tokens_and_steps_that_run_ahead_have_the_same_ones(model_dir: Path, sampling: Sampling) -> None:
    """Several tokens in a step, and a last token that is still on the device when penalties count it."""
    wanted = [
        request(str(n), text, seed=n, logprobs=3, sampling=sampling, max_tokens=50) for n, text in enumerate(TEXTS)
    ]

    def told(speculate: int = 0, depth: int = 0) -> dict[str, tuple[list[int], bytes]]:
        engine = slot_engine(model_dir, speculate=speculate, depth=depth)
        return {name: (one.tokens, log_of(one)) for name, one in run(engine, wanted).items()}

    plain = told()
    assert told(depth=1) == plain
    assert told(speculate=8) == plain
    assert told(speculate=8, depth=1) == plain


def test_from_another_engines_text_they_begin_where_that_ended(model_dir: Path) -> None:
    """Its tokens may be others: of the text so far nothing is known here, and what was said of tokens that had no text
    yet is void."""
    engine = tiny_engine(model_dir)
    shown = b"ein Rad"
    held_back = log_of(run(engine, [request("a", "x", max_tokens=1, logprobs=0)])["a"])

    resumed = run(engine, [request("a", "the mill", shown=shown, logprobs=2, max_tokens=20)])["a"]
    earlier = _moved(held_back, len(shown))
    records = shown_records(earlier + log_of(resumed), len(resumed.text))

    assert records == shown_records(log_of(resumed), len(resumed.text))
    assert records[0].at == len(shown)
    assert joined(records).decode("utf-8", "replace") == resumed.text[len(shown) :].decode()


def _moved(raw: bytes, at: int) -> bytes:
    return raw[:2] + at.to_bytes(4, "little") + raw[6:]


def joined(records: list[TokenLogprobs]) -> bytes:
    return b"".join(record.chosen.token for record in records if not record.chosen.special)


def test_their_bytes_are_the_text_and_each_stands_where_its_token_begins(model_dir: Path) -> None:
    """The tiny model speaks in bytes, most of which are parts of characters or no UTF-8 at all."""
    outcome = run(tiny_engine(model_dir), [request("a", "bytes", max_tokens=80, logprobs=0)])["a"]

    records = shown_records(log_of(outcome), len(outcome.text))

    assert joined(records).decode("utf-8", "replace") == outcome.text.decode()
    assert [record.at for record in records] == sorted(record.at for record in records)
    assert len(records) == 80
    for record in records:
        if record.chosen.token.isascii() and not record.chosen.special:
            assert outcome.text[record.at : record.at + len(record.chosen.token)] == record.chosen.token


def test_the_likeliest_come_in_falling_order_and_all_of_them_sum_to_one(model_dir: Path) -> None:
    outcome = run(tiny_engine(model_dir), [request("a", "order", logprobs=20, max_tokens=8)])["a"]

    for record in shown_records(log_of(outcome), len(outcome.text)):
        values = [one.logprob for one in record.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 20
        assert sum(map(math.exp, values)) <= 1 + 1e-6
        assert record.top[0] == record.chosen  # greedy


def test_a_stop_string_has_none_and_text_that_was_held_back_has_its_own(model_dir: Path) -> None:
    engine = tiny_engine(model_dir)
    free = run(engine, [request("a", "stop", max_tokens=60, logprobs=1)])["a"]
    text = free.text.decode()
    at = next(n for n in range(10, len(text) - 3) if text.find(text[n : n + 3]) == n)
    stop = text[at : at + 3]

    stopped = run(engine, [request("a", "stop", max_tokens=60, logprobs=1, stop=(stop,))])["a"]
    records = shown_records(log_of(stopped), len(stopped.text))

    assert stopped.end is not None and stopped.end.reason == "stop"
    assert stopped.text.decode() == text[:at]
    assert records == shown_records(log_of(free), len(stopped.text))


def test_nobody_else_gets_any(model_dir: Path) -> None:
    wanted = [request("a", "yes", logprobs=2), request("b", "no")]

    outcomes = run(tiny_engine(model_dir), wanted)

    assert log_of(outcomes["a"]) and not log_of(outcomes["b"])


def test_a_bias_moves_the_draw_and_not_the_log_probabilities(model_dir: Path) -> None:
    engine = tiny_engine(model_dir)
    plain = run(engine, [request("a", "bias", logprobs=3, max_tokens=1)])["a"]
    banned = Sampling(temperature=0.0, logit_bias=((plain.tokens[0], -100.0),))

    biased = run(engine, [request("a", "bias", logprobs=3, max_tokens=1, sampling=banned)])["a"]

    first, second = (shown_records(log_of(one), 100)[0] for one in (plain, biased))
    assert biased.tokens != plain.tokens
    assert first.top == second.top
    assert second.chosen == first.top[1]


def test_a_bias_on_a_token_that_is_none_is_the_clients_error(model_dir: Path) -> None:
    engine = tiny_engine(model_dir)
    wanted = request("a", "x", sampling=Sampling(logit_bias=((engine.text.vocabulary, 1.0),)))

    end = run(engine, [wanted])["a"].end

    assert end is not None and (end.error_code, end.fault) == ("bad_request", "client")
    assert "logit_bias" in end.error_message
