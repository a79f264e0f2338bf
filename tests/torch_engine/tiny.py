"""Builders: tiny random models in Hugging Face form, requests, and a core that runs to the end."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bus.ids import ModelName
from bus.jobs import ChatJob, Message, Sampling
from gpu_worker.engine import End, GenerateRequest, Piece
from gpu_worker.torch_engine.assembly import Assembled, assemble
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.detokenizer import byte_level_alphabet
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder
from gpu_worker.torch_engine.model import Decoder
from gpu_worker.torch_engine.prompt import Answer, prepare

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GREEDY = Sampling(temperature=0.0)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,  # a tied head would mostly repeat the last token
    "hidden_act": "silu",
    "eos_token_id": 2,
}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE: special tokens, all 256 bytes, a few merges."""
    pieces = [*SPECIAL, *byte_level_alphabet()]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("e", "r")]
    pieces += ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: token for token, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    return tokenizer


def tiny_tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights, large enough that the next token depends on the whole prefix."""
    generator = torch.Generator().manual_seed(seed)
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def normal(*shape: int) -> torch.Tensor:
        scale: float = 1.5 / shape[-1] ** 0.5
        return torch.randn(*shape, generator=generator) * scale

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden) * 4,
        "model.norm.weight": torch.ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = normal(*shape)
            if config["architectures"] == ["Qwen2ForCausalLM"] and name[-6] in "qkv":
                tensors[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            for name in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{name}.weight"] = torch.rand(config["head_dim"], generator=generator) + 0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.rand(hidden, generator=generator) + 0.5
    return tensors


def tiny_model(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A model directory with random weights; `changes` are fields of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size()} | changes
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    save_file(tiny_tensors(config, seed), directory / "model.safetensors")
    return directory


def tiny_engine(directory: Path, **changes: Any) -> Assembled:
    return assemble(engine_config(directory, **changes))


def torch_decoder(engine: Assembled) -> Decoder:
    """Of an engine with kernels="torch"."""
    assert isinstance(engine.model, Decoder)
    return engine.model


def embedding_of(engine: Assembled) -> torch.Tensor:
    model = engine.model
    embedding = model.embedding if isinstance(model, CompiledDecoder) else torch_decoder(engine).weights.embedding
    assert isinstance(embedding, torch.Tensor)
    return embedding


def engine_config(directory: Path, **changes: Any) -> TorchEngineConfig:
    plain: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "warm_up": False,
        "kv_tokens": 4096,
        "capacity": 16,
    }
    return TorchEngineConfig(model_dir=directory, model_name="tiny", **(plain | changes))


def request(
    name: str, text: str, *, forced: Sequence[int] = (), shown: bytes = b"", seed: int = 7, **job: Any
) -> GenerateRequest:
    """A request for one user message; `job` are fields of ChatJob."""
    fields: dict[str, Any] = {
        "messages": (Message("user", text),),
        "max_tokens": 24,
        "sampling": GREEDY,
        "ignore_eos": True,
    }
    chat = ChatJob(model=ModelName("tiny"), **(fields | job))
    return GenerateRequest(name, chat, seed=seed, forced_tokens=tuple(forced), forced_text=shown)


class Outcome:
    """Everything one sequence said; offsets are checked as the pieces come."""

    def __init__(self, wanted: GenerateRequest) -> None:
        self.tokens = list(wanted.forced_tokens)
        self.text = wanted.forced_text
        self.pieces: list[Piece] = []
        self.end: End | None = None

    def take(self, piece: Piece) -> None:
        assert self.end is None, "a piece after the end"
        assert piece.text_offset == len(self.text)
        assert piece.token_offset == len(self.tokens)
        self.pieces.append(piece)
        self.tokens += piece.tokens
        self.text += piece.text
        self.end = piece.end


def run(
    engine: Assembled, requests: Iterable[GenerateRequest], *, cancel_at: Mapping[str, int] | None = None
) -> dict[str, Outcome]:
    """Run all to the end. cancel_at: sequence -> number of tokens after which it is cancelled."""
    outcomes: dict[str, Outcome] = {}
    for wanted in requests:
        outcomes[wanted.sequence] = Outcome(wanted)
        answer = prepare(wanted, engine.text, context_max=engine.context)
        if isinstance(answer, Answer):
            deliver(engine.core.add(answer), outcomes)
        else:
            outcomes[wanted.sequence].end = answer
    for _ in range(100_000):
        if engine.core.idle:
            return outcomes
        deliver(engine.core.step().pieces, outcomes)
        for name, count in (cancel_at or {}).items():
            if outcomes[name].end is None and len(outcomes[name].tokens) >= count:
                deliver(engine.core.cancel(name), outcomes)
    raise AssertionError("the engine does not come to an end")


def deliver(pieces: Iterable[Piece], outcomes: Mapping[str, Outcome]) -> None:
    for piece in pieces:
        outcomes[piece.sequence].take(piece)
