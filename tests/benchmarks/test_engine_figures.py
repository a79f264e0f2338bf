"""The arithmetic of `benchmarks.engine`: what token times, rounds and a model's shape come to."""

import dataclasses

import pytest

from benchmarks.engine.contenders import PEERS, choose_peers
from benchmarks.engine.costs import matrix_values, step_cost, weight_bytes
from benchmarks.engine.figures import Burst, decode_rate, measure, over_rounds, percentile
from benchmarks.engine.report import Row, table
from benchmarks.engine.token_counts import tokens_of_chunks
from gpu_worker.torch_engine.model_config import parse_config

SHAPE = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
)
BURST = Burst(
    requests=2,
    decode_rate=10.0,
    whole_rate=8.0,
    first_p50_ms=100.0,
    first_max_ms=150.0,
    between_p50_ms=20.0,
    between_p99_ms=30.0,
    peak_mib=500.0,
    largest_mib=500.0,
    load=0.0,
)


def test_the_decode_rate_is_that_of_the_time_in_which_all_requests_run():
    """What comes while one is still prefilled, or when one has ended, would flatter or spoil it."""
    early = [1.0, 2.0, 3.0, 4.0, 5.0]
    late = [3.0, 4.0, 5.0, 6.0, 7.0]

    # after 3.0 and up to 5.0: two tokens each
    assert decode_rate([early, late]) == pytest.approx(4 / 2.0)


def test_one_request_alone_decodes_from_its_first_token_to_its_last():
    assert decode_rate([[2.0, 2.5, 3.0]]) == pytest.approx(2 / 1.0)


def test_there_is_no_decode_rate_if_all_never_ran_together():
    assert decode_rate([[1.0, 2.0], [2.0, 3.0]]) is None


def test_tokens_that_come_in_one_piece_are_waited_for_once():
    """Zeros between them would hide how long a reader waits."""
    found = measure([[(0.5, 1), (0.7, 2)], [(0.9, 3)]], peak_mib=2.0, largest_mib=1.0, load=0.5)

    assert found.requests == 2
    assert found.first_p50_ms == pytest.approx(700.0)
    assert found.first_max_ms == pytest.approx(900.0)
    assert found.whole_rate == pytest.approx(6 / 0.9)
    assert found.between_p50_ms == pytest.approx(200.0)


def test_a_request_without_a_token_is_no_measurement():
    with pytest.raises(ValueError, match="no token"):
        measure([[(0.5, 1)], []], peak_mib=1.0, largest_mib=1.0, load=0.0)


def test_percentiles_are_values_that_were_measured():
    values = [float(value) for value in range(100, 0, -1)]

    assert percentile(values, 0.5) == 51.0
    assert percentile(values, 0.99) == 100.0
    assert percentile([7.0], 0.99) == 7.0


def test_rounds_give_their_median_and_the_best_rate_and_the_memory_of_the_first():
    """A peak of memory never falls, so that of a later round is that of the largest burst."""
    rates = (10.0, 30.0, None, 12.0)
    rounds = [dataclasses.replace(BURST, decode_rate=one, peak_mib=500.0 + n) for n, one in enumerate(rates)]

    found = over_rounds(rounds)

    assert (found.decode_rate, found.decode_rate_best) == (12.0, 30.0)
    assert found.peak_mib == 500.0


def test_a_step_reads_all_matrices_once_and_the_keys_and_values_of_every_request():
    """The default model by hand: 134.5 million weights in matrices, 11,520 keys and values a token."""
    query_and_output, keys_and_values, gate_up_down = 2 * 9 * 64, 2 * 3 * 64, 3 * 1536
    layer = 576 * (query_and_output + keys_and_values + gate_up_down)
    assert matrix_values(SHAPE) == 30 * layer + 576 * 49_152 == 134_479_872

    cost = step_cost(SHAPE, requests=8, tokens=200, weight_bytes=1e6, kv_itemsize=4)

    assert cost.bytes_read == 1e6 + 8 * 200 * 11_520 * 4
    assert cost.operations == 8 * (2 * matrix_values(SHAPE) + 4 * 200 * 30 * 9 * 64)


def test_bytes_of_weights_are_those_of_the_file_else_what_is_said_else_what_the_storage_implies():
    values = matrix_values(SHAPE)

    assert weight_bytes({"storage": "q4_1"}, SHAPE, 98_000_000) == 98_000_000
    assert weight_bytes({"weight_mib": 2, "weight_kind": "half"}, SHAPE, None) == 2 * 2**20
    assert weight_bytes({"weight_mib": None, "weight_kind": "half"}, SHAPE, None) == 2 * values
    assert weight_bytes({"storage": "float32"}, SHAPE, None) == 4 * values
    assert weight_bytes({"storage": "never heard of"}, SHAPE, None) is None


@pytest.mark.parametrize(
    ("texts", "total", "expected"),
    [
        (["a b", "c"], 3, [2, 1]),
        (["a b c", "d"], 3, [2, 1]),  # tokenised alone it seemed more than it was
        (["a b", "c"], 5, [3, 2]),  # and less
        (["a", "b"], 2, [1, 1]),
        (["a b c d", ""], 2, [1, 1]),
    ],
)
def test_chunks_of_text_together_stand_for_every_token(texts: list[str], total: int, expected: list[int]):
    assert tokens_of_chunks(texts, total, lambda text: len(text.split())) == expected


@pytest.mark.parametrize("texts", [[], ["a", "b", "c"]])
def test_more_chunks_than_tokens_or_none_at_all_are_refused(texts: list[str]):
    with pytest.raises(ValueError, match="cannot be"):
        tokens_of_chunks(texts, 2, len)


def test_the_table_goes_by_requests_and_shows_shares_of_the_roofs():
    one = over_rounds([dataclasses.replace(BURST, requests=1, decode_rate=50.0, peak_mib=600.0, largest_mib=400.0)])
    two = over_rounds([dataclasses.replace(BURST, decode_rate=None)])
    cost = step_cost(SHAPE, requests=1, tokens=0, weight_bytes=1e8, kv_itemsize=4)

    lines = table(
        [Row("b", two, cost), Row("a", one, cost)], bandwidth=1e10, products=cost.operations * 500
    ).splitlines()

    assert lines[2] == "| 1 | a | 50.0 (best 50.0) | 8.0 | 100 / 150 | 20.0 / 30.0 | 600, largest 400 | 50% | 10% |"
    assert lines[3] == "| 2 | b | - (best -) | 8.0 | 100 / 150 | 20.0 / 30.0 | 500 | - | - |"


def test_peers_are_chosen_by_the_beginning_of_their_names():
    assert [peer.name for peer in choose_peers("vllm,llama")] == ["llama.cpp", "vllm-float32", "vllm-bfloat16"]
    assert choose_peers("none") == []
    assert choose_peers("llama.cpp,vllm,transformers") == list(PEERS)
    with pytest.raises(ValueError, match=r"'vlm'.*vllm-float32"):
        choose_peers("vlm")
