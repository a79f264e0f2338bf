"""The default model itself: sensible English, its own tokenizer, and exactness at its real shapes."""

from pathlib import Path

import pytest
import torch

from bus.jobs import Message, Sampling
from bus.settings import Settings
from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.detokenizer import TextStream
from tests.torch_engine.tiny import request, run, tiny_engine, torch_decoder

FRANCE = "What is the capital of France?"
CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = [
    "Write a story about a river and a mill.",
    "Explain gravity to a child.",
    "Write a Python function that sorts a list.",
    "What is 12 times 7?",
    "Translate 'good morning' to Spanish, German and French.",
    "Why is the sky blue?",
    "Write a haiku about snow.",
    "Summarise: " + "The quick brown fox jumps over the lazy dog. " * 30,
]


@pytest.fixture(scope="module")
def smol(real_model_dir: Path) -> Assembled:
    return tiny_engine(real_model_dir, kv_tokens=8192, prefix_cache=False)


def test_it_knows_the_capital_of_france(smol: Assembled) -> None:
    outcome = run(smol, [request("a", FRANCE, ignore_eos=False, max_tokens=40)])["a"]

    assert "Paris" in outcome.text.decode()
    assert outcome.end is not None
    assert outcome.end.reason == "stop"


def test_its_template_and_its_sampling_defaults_are_its_own(smol: Assembled) -> None:
    assert smol.text.render((Message("user", FRANCE),)) == CHATML
    assert smol.text.defaults.temperature == 0
    assert smol.text.encode(CHATML, special=False)[:3] == [1, 9690, 198]


def test_any_token_sequence_reads_as_the_tokenizer_reads_it(smol: Assembled) -> None:
    generator = torch.Generator().manual_seed(11)
    for tokens in torch.randint(17, 49152, (1500, 12), generator=generator).tolist():
        stream = TextStream(smol.text.token_bytes, ())
        found = "".join(stream.feed(token) for token in tokens) + stream.finish()

        assert found == smol.text.tokenizer.decode(tokens)


def test_the_same_tokens_alone_batched_chunked_and_resumed(real_model_dir: Path, smol: Assembled) -> None:
    """The promise of the kill tests, at the real shapes: greedy, float32, another engine with other batches.

    One thread in both, since two would wait for each other on a busy machine; the next test is about threads.
    """
    some = PROMPTS[:3]
    alone = {str(n): run(smol, [request(str(n), text, max_tokens=8)])[str(n)].tokens for n, text in enumerate(some)}
    other = tiny_engine(real_model_dir, kv_tokens=4096, prefill_chunk=19, capacity=3)

    batched = run(other, [request(str(n), text, max_tokens=8) for n, text in enumerate(some)])
    resumed = run(other, [request(str(n), t, max_tokens=8, forced=alone[str(n)][:3]) for n, t in enumerate(some)])

    assert {name: outcome.tokens for name, outcome in batched.items()} == alone
    assert {name: outcome.tokens for name, outcome in resumed.items()} == alone


def test_two_threads_give_the_bits_of_one_in_torch(real_model_dir: Path) -> None:
    """A node may have other cores than the one that it takes over from."""
    weights = torch_decoder(tiny_engine(real_model_dir, kernels="torch")).weights
    layer = weights.layers[3]
    products = [layer.qkv, layer.output, layer.gate_up, layer.down, weights.head]
    rows = torch.randn(50, 1536, generator=torch.Generator().manual_seed(5))

    def every_product() -> list[torch.Tensor]:
        narrow = rows[:, :576].contiguous()
        return [one(rows if one is layer.down else narrow) for one in products if one is not None]

    alone = every_product()
    torch.set_num_threads(2)
    try:
        together = every_product()
    finally:
        torch.set_num_threads(1)

    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.slow
def test_long_answers_are_the_same_in_every_way(real_model_dir: Path, smol: Assembled) -> None:
    wanted = [request(str(n), text, max_tokens=40) for n, text in enumerate(PROMPTS)]
    alone = {one.sequence: run(smol, [one])[one.sequence].tokens for one in wanted}
    for changes in ({"capacity": 8}, {"capacity": 3, "prefill_chunk": 37}, {"capacity": 8, "kv_tokens": 1024}):
        other = tiny_engine(real_model_dir, **({"kv_tokens": 8192, "threads": 2} | changes))
        assert {name: outcome.tokens for name, outcome in run(other, wanted).items()} == alone, changes
        half = [request(str(n), t, max_tokens=40, forced=alone[str(n)][: 3 + 5 * n]) for n, t in enumerate(PROMPTS)]
        assert {name: outcome.tokens for name, outcome in run(other, half).items()} == alone, changes


@pytest.mark.slow
def test_sampled_answers_resume_with_the_same_draws(real_model_dir: Path, smol: Assembled) -> None:
    hot = Sampling(temperature=1.0, top_p=0.95)
    whole = run(smol, [request("a", PROMPTS[0], max_tokens=48, sampling=hot)])["a"].tokens
    other = tiny_engine(real_model_dir, prefill_chunk=50)

    resumed = run(other, [request("a", PROMPTS[0], max_tokens=48, sampling=hot, forced=whole[:20])])["a"].tokens

    assert resumed == whole


@pytest.mark.slow
def test_bfloat16_answers_sensibly(real_model_dir: Path) -> None:
    """To a text that has one good end: a question's first word is a near tie, which rounding may turn."""
    wanted = request("a", "", messages=(), prompt="The capital of France is", max_tokens=4)

    outcome = run(tiny_engine(real_model_dir, dtype="bfloat16"), [wanted])["a"]

    assert "Paris" in outcome.text.decode()


def test_the_settings_default_is_one_engine_config(real_model_dir: Path) -> None:
    config = TorchEngineConfig.from_settings(Settings(), real_model_dir)

    assert config.model_name == "smollm2-135m-instruct"
