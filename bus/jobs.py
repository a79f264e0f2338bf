"""What a chat job is: only values that an engine can run exist as these types.

Built by `bus.chat_request` from OpenAI-style JSON; carried as msgpack in the job hash.
"""

from collections.abc import Collection
from typing import Literal, get_args

import msgspec

from bus.ids import ModelName

PROMPT_BYTES_MAX = 8 * 1024 * 1024
STOP_STRINGS_MAX = 16
MAX_TOKENS_LIMIT = 1_000_000
REPETITION_PENALTY_MIN = 0.01  # logits are divided by it: still smaller ones leave float32
REPETITION_PENALTY_MAX = 2.0
LOGPROBS_MAX = 20  # likeliest tokens shown beside each token; OpenAI's limit


Capability = Literal["logprobs"]  # what a job may ask of its node that not every node can do
CAPABILITIES: frozenset[str] = frozenset(get_args(Capability))


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str  # system | developer | user | assistant | tool
    content: str
    name: str | None = None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """`None` means the model's own default (its generation config); temperature 0 is greedy."""

    temperature: float | None = None  # 0..2
    top_p: float | None = None  # (0, 1]
    top_k: int | None = None  # >= 1; 0 switches it off
    seed: int | None = None  # None: fixed at submit, kept in the job hash, so that every attempt draws alike
    min_p: float | None = None  # [0, 1]
    presence_penalty: float | None = None  # -2..2, like the next
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None  # 0.01..2; 1 changes nothing
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, -100..100), each token once


class ChatJob(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation. Exactly one of `messages` and `prompt` is set.

    messages: rendered through the model's chat template. prompt: raw text, continued as it stands.
    max_tokens: upper bound on new tokens; None = what the context leaves.
    stream: frames are sent as they come; otherwise only the terminal, which then carries the text.
    logprobs: None = not asked for; else of each token, and of so many likeliest ones beside it (0..LOGPROBS_MAX).
    """

    model: ModelName
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stream: bool = False
    ignore_eos: bool = False  # benchmarks: run to max_tokens
    logprobs: int | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ChatJob)


def encode_job(job: ChatJob) -> bytes:
    return _encoder.encode(job)


def decode_job(raw: bytes) -> ChatJob:
    """Raises msgspec.DecodeError (ValidationError included) on foreign bytes."""
    return _decoder.decode(raw)


def needs_of(job: ChatJob) -> tuple[Capability, ...]:
    return () if job.logprobs is None else ("logprobs",)


def is_able(can: Collection[str] | None, cannot: Collection[str], needs: Collection[str]) -> bool:
    """Whether a node can do what a job needs. can: what it says; None: it does not say, and is asked. cannot: what it
    has refused to do a moment ago. Names beyond `Capability` are another release's."""
    return all((can is None or need in can) and need not in cannot for need in needs)


def estimate_prompt_tokens(job: ChatJob) -> int:
    """About four bytes a token for English; only for load scores and admission, never for limits."""
    size = (
        len(job.prompt.encode()) if job.prompt is not None else sum(len(m.content.encode()) + 12 for m in job.messages)
    )
    return size // 4 + 1


def estimate_new_tokens(job: ChatJob) -> int:
    return min(job.max_tokens if job.max_tokens is not None else 256, 4096)
