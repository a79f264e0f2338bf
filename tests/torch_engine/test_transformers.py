"""Numbers and templates, held to transformers: the library whose results people expect of a published model.

Its own classes make tiny random checkpoints, one for each family and each way to write its config; both load them.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bus.jobs import Message
from gpu_worker.torch_engine.batch import build_batch
from gpu_worker.torch_engine.chat_template import ChatTemplate, TemplateError
from gpu_worker.torch_engine.model import Model
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.quantized import Quantized
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence
from tests.torch_engine.tiny import TEMPLATE, request, run, tiny_engine, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": tiny_tokenizer().get_vocab_size(),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that the next token depends on the whole prefix
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EACH = [1.0 + 0.1 * pair for pair in range(8)]  # longrope: the stretch of each of 8 pairs
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama 2": (LlamaConfig, {}),
    "llama 2, every head its own keys": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama 3, scaled": (
        LlamaConfig,
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 500000.0}},
    ),
    "llama, all biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "llama, dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama, longrope": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "longrope", "short_factor": EACH, "long_factor": EACH, "rope_theta": 1e4}},
    ),
    "smollm2, tied": (LlamaConfig, {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 96}),
    "llama, wide heads": (LlamaConfig, {"head_dim": 32}),
    "mistral": (
        MistralConfig,
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2.5, yarn": (Qwen2Config, {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "yarn, every field": (
        LlamaConfig,
        {
            "rope_parameters": YARN
            | {"rope_theta": 1e4, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.5}
            | {"truncate": False}
        },
    ),
    "yarn, its attention factor": (
        MistralConfig,
        {"sliding_window": None, "rope_parameters": YARN | {"rope_theta": 1e4, "attention_factor": 1.3}},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "qwen3, yarn with what transformers leaves out": (  # DeepSeek-R1-0528-Qwen3-8B
        Qwen3Config,
        {"head_dim": 16, "rope_parameters": YARN | {"rope_theta": 1e6, "attn_factor": 0.8782488562869419}},
    ),
    "qwen3, biased": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


def checkpoint(directory: Path, family: str) -> PreTrainedModel:
    kind, changes = FAMILIES[family]
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**(SHAPE | changes))).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # made as zeros and ones, which would hide what is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return model


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@torch.inference_mode()
def engine_logits(model: Model, tokens: list[int], rows: int) -> torch.Tensor:
    """(length, V), computed in steps of so many tokens by whatever the engine runs on this machine."""
    sequence = Sequence("s", tokens, len(tokens), 0, 1024, SamplingChoice(0.0, 1.0, 0, 0))
    sequence.blocks = list(range(1, 2 + len(tokens) // model.block_tokens))
    found = []
    for start in range(0, len(tokens), rows):
        work = Work(sequence, start, tuple(tokens[start : start + rows]), sampled=0)
        batch = build_batch(Plan(prefill=(work,)), block_tokens=model.block_tokens)
        found.append(model.logits(model.forward(batch)).clone())  # the next step may write over it
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Over several times the length that a scaled RoPE was trained with, prefilled in chunks; on a CPU both ways."""
    model = checkpoint(tmp_path, family)
    tokens = [3 + (7 * n * n + n) % 250 for n in range(300)]
    expected = expected_logits(model, tokens)

    for kernels in ("torch", "auto"):
        found = engine_logits(tiny_engine(tmp_path, kernels=kernels).model, tokens, rows=130)

        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), kernels


@pytest.mark.parametrize("family", ["llama 3, scaled", "smollm2, tied", "qwen2.5, yarn", "qwen3", "mistral"])
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family)
    text = "the river and the mill " * 8
    prompt = tiny_tokenizer().encode(text).ids

    found = run(tiny_engine(tmp_path), [request("a", "", messages=(), prompt=text, max_tokens=32)])["a"].tokens

    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=-1,
    )
    assert found == expected[0, len(prompt) :].tolist()


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a mill<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b") %}{%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}{{- '\n' + message.content.split('</think>')[-1].lstrip('\n') }}
        {%- for call in message.tool_calls %}{{- call.arguments | tojson }}{%- endfor %}
        {{- '<|im_end|>\n' if loop.index0 > ns.last else '<|im_end|> \n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
JSON = (
    "{{ messages | tojson(indent=2, sort_keys=true) }}{{ '<b>' | tojson(ensure_ascii=true) }}{{ cls_token is defined }}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN, "json": JSON}
TALKS = {
    "one question": (("user", "  What is a mill?\n"),),
    "with a system message": (("system", " Be brief. "), ("user", "<b>日本</b> & 'more'")),
    "several turns": (
        ("user", "a"),
        ("assistant", "<think>so</think>\n\nb"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ),
    "out of turn": (("user", "a"), ("user", "b")),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_it_says_in_transformers(name: str, talk: str) -> None:
    """The published templates' ways: loop controls, namespaces, trimming, refusals, tools that are not there."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **special)
    plain = [{"role": role, "content": content} for role, content in TALKS[talk]]
    template = ChatTemplate(TEMPLATES[name], special)
    messages = tuple(Message(role, content) for role, content in TALKS[talk])
    try:
        expected = tokenizer.apply_chat_template(
            plain, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as refusal:
        with pytest.raises(TemplateError, match=re.escape(str(refusal))):
            template.render(messages)
    else:
        assert template.render(messages) == expected


@pytest.fixture(scope="module")
def original(real_model_dir: Path) -> PreTrainedModel:
    """The default model, with the weights that the engine loads, dequantised."""
    config = AutoConfig.from_pretrained(real_model_dir)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = load_file(real_model_dir / "model.safetensors")
    whole = {name: tensor for name, tensor in stored.items() if name.endswith("norm.weight")}
    for name in (name for name in stored if name.endswith((".q4", ".q8"))):
        matrix = name[:-3]
        parts = (stored[name], stored[f"{matrix}.scale"], stored.get(f"{matrix}.min"))
        whole[matrix] = Quantized(int(name[-1]), *parts).dequantize()
    missing, unexpected = model.load_state_dict(whole, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


STORY = "Write a story about a river and a mill. Once the river was high, and the miller's daughter said:"


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "tolerance"), [("auto", 1e-4), ("torch", 1e-3)])
def test_the_default_models_logits_are_those_of_transformers(
    original: PreTrainedModel, real_model_dir: Path, kernels: str, tolerance: float
) -> None:
    """torch's own products have its weights rounded to float16 (linear.py); the compiled ones have them whole."""
    tokens = Tokenizer.from_file(str(real_model_dir / "tokenizer.json")).encode(STORY).ids

    found = engine_logits(tiny_engine(real_model_dir, kernels=kernels).model, tokens, rows=64)

    expected = expected_logits(original, tokens)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.slow
def test_the_default_models_greedy_text_is_that_of_transformers(
    original: PreTrainedModel, real_model_dir: Path
) -> None:
    """Each token is the likeliest there too, or as good as."""
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    talk = [{"role": "user", "content": STORY}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]

    found = run(tiny_engine(real_model_dir), [request("a", STORY, max_tokens=48, ignore_eos=False)])["a"]

    logits = expected_logits(original, prompt + found.tokens)[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(found.tokens)[:, None]).squeeze(1)
    assert (logits.amax(1) - chosen).max() < 0.05
    assert (logits.argmax(1) == torch.tensor(found.tokens)).float().mean() > 0.9
    assert found.text.decode() == tokenizer.decode(found.tokens, skip_special_tokens=True)
