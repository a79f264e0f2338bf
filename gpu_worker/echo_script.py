"""What the echo engine will say to a prompt: pure, so that any attempt on any node says the same.

The answer repeats the words of the last message; token k is word k modulo their number, with a space between. A
directive in the prompt plays trouble: `[[tokens=5 delay_ms=10 fail_at=3 fault=node]] one two three`. Known keys:

    tokens=N      length of the answer (default: as many as the prompt has words)
    delay_ms=N    pause before each token; first_ms=N before the first
    fail_at=N     end with an error before token N; fault=node (default) or client says whose
    poison[=N]    kill the process before token N (default 0), at every attempt
    stall[=N]     the whole engine makes no progress any more from token N on
"""

import re
import zlib
from typing import Literal

import msgspec

from bus.jobs import ChatJob

CONTEXT_LENGTH = 131_072
DIRECTIVE = re.compile(r"\[\[([a-z0-9_= ]*)\]\]")


class EchoKnobs(msgspec.Struct, frozen=True):
    """Defaults from the settings; a directive overrides them for its own prompt."""

    delay_ms: int = 0
    first_ms: int = 0
    fail_at: int | None = None
    poison: str = ""  # a prompt that contains this kills the process


class EchoScript(msgspec.Struct, frozen=True):
    words: tuple[str, ...]  # never empty
    tokens: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    delay_s: float = 0.0
    first_s: float = 0.0
    fail_at: int | None = None
    fault: Literal["client", "node"] = "node"
    poison_at: int | None = None
    stall_at: int | None = None
    outgrown: bool = False  # it ends because the context is full


class BadPrompt(msgspec.Struct, frozen=True):
    code: str
    message: str


def write_script(job: ChatJob, knobs: EchoKnobs, context_length: int = CONTEXT_LENGTH) -> EchoScript | BadPrompt:
    prompt = job.prompt if job.prompt is not None else job.messages[-1].content if job.messages else ""
    found = DIRECTIVE.search(prompt) if "[[" in prompt else None
    orders = parse_directive(found.group(1)) if found else {}
    spoken = DIRECTIVE.sub("", prompt) if found else prompt
    words = tuple(spoken.split()) or ("echo",)
    if len(words) > context_length:
        return BadPrompt("context_length_exceeded", f"the prompt has {len(words)} tokens, the context {context_length}")
    room = context_length - len(words)
    limit = room if job.max_tokens is None else min(job.max_tokens, room)
    wanted = orders.get("tokens", len(words))
    tokens = limit if job.ignore_eos else min(wanted, limit)
    reason: Literal["stop", "length"] = "length" if job.ignore_eos or tokens < wanted else "stop"
    if job.stop:
        tokens, reason = cut_at_stop(words, tokens, reason, job.stop)
    outgrown = reason == "length" and tokens == room and tokens != job.max_tokens
    poisoned = 0 if knobs.poison and knobs.poison in prompt else None
    return EchoScript(
        words=words,
        tokens=tokens,
        reason=reason,
        prompt_tokens=len(words),
        delay_s=orders.get("delay_ms", knobs.delay_ms) / 1000,
        first_s=orders.get("first_ms", knobs.first_ms) / 1000,
        fail_at=orders.get("fail_at", knobs.fail_at),
        fault="client" if found and "fault=client" in found.group(1) else "node",
        poison_at=orders.get("poison", poisoned),
        stall_at=orders.get("stall"),
        outgrown=outgrown,
    )


def parse_directive(inside: str) -> dict[str, int]:
    """The whole numbers of a directive; a bare word counts as 0, anything else is passed over."""
    orders: dict[str, int] = {}
    for item in inside.split():
        key, equals, value = item.partition("=")
        if not equals:
            orders[key] = 0
        elif value.isdecimal():
            orders[key] = int(value)
    return orders


def cut_at_stop(
    words: tuple[str, ...], tokens: int, reason: Literal["stop", "length"], stops: tuple[str, ...]
) -> tuple[int, Literal["stop", "length"]]:
    """Tokens before the first stop string; the echo only stops between words, so a word with the stop is left out."""
    text = text_of(words, 0, tokens).decode()
    at = min((found for found in (text.find(stop) for stop in stops) if found >= 0), default=None)
    if at is None:
        return tokens, reason
    kept = 0
    while kept < tokens and len(text_of(words, 0, kept + 1).decode()) <= at:
        kept += 1
    return kept, "stop"


def text_of(words: tuple[str, ...], start: int, end: int) -> bytes:
    """The bytes of tokens start..end of the answer, end excluded."""
    count = len(words)
    if end - start == 1:
        word = words[start % count]
        return (word if start == 0 else " " + word).encode()
    joined = " ".join(words[at % count] for at in range(start, end))
    return (joined if start == 0 or not joined else " " + joined).encode()


def tokens_of(words: tuple[str, ...], start: int, end: int) -> tuple[int, ...]:
    """Token ids of start..end: a checksum of the word, so that ids stored by another attempt can be compared."""
    count = len(words)
    return tuple(zlib.crc32(words[at % count].encode()) & 0x7FFFFFFF for at in range(start, end))


def position_after(script: EchoScript, text_len: int, token_len: int) -> int:
    """How many tokens a forced prefix covers: as many as it has ids, else the first count with a text as long."""
    if token_len or not text_len:
        return token_len
    position = length = 0
    while length < text_len and position < script.tokens:
        length += len(text_of(script.words, position, position + 1))
        position += 1
    return position
