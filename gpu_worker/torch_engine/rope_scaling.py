"""Rotary positions as configs describe them: how fast each pair of dimensions turns, and up to which length. Pure.

Two rules change their numbers with the length of the sequence: `dynamic` beyond the trained length, and `longrope` at
it. Keys that lie in a cache were turned by the numbers of their time, so a sequence that crosses that length would mix
two of them. Such models are served up to it, where their numbers are the same for every sequence, and exact.

YaRN's `attn_factor` is in published configs (DeepSeek-R1-0528-Qwen3-8B: just what undoes YaRN's own factor), and
multiplies that in the paper's code. transformers leaves it out, by now vLLM too, and so do we, with a line in the log.

Sources: linear (kaiokendev), dynamic (bloc97 and emozilla), YaRN (Peng et al., 2023), LongRoPE (Ding et al., 2024) and
Llama 3.1's own; each held to transformers' numbers by test_transformers.py.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from gpu_worker.engine import EngineStartError

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]

THETA = 10_000.0
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", "original_max_position_embeddings"}
NUMBERS = {
    *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    frequencies: tuple[float, ...]  # angle per position of each pair of dimensions: head_dim / 2 of them
    attention_factor: float  # the turned queries and keys grow by it
    context: int  # tokens of a sequence at most


def parse_rope(raw: Fields, head_dim: int) -> Rope:
    """raw: config.json. Raises EngineStartError on a rule or a field that we do not compute, or that lacks."""
    fields = _fields(raw)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in RULES:
        raise EngineStartError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(RULES)}")
    rule, known = RULES[kind]
    unknown = sorted(name for name in fields.keys() - known - COMMON if fields[name] is not None)
    if kind == "yarn" and "attn_factor" in unknown:
        unknown.remove("attn_factor")
        log.warning("config.json: RoPE's attn_factor is left out, as transformers does; attention_factor would count")
    if unknown:
        raise EngineStartError(f"config.json: rope type {kind!r} with {unknown[0]} is not supported")
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise EngineStartError("config.json: partial_rotary_factor other than 1 is not supported")
    if head_dim % 2:
        raise EngineStartError(f"config.json: head_dim {head_dim} is odd, and rotation takes pairs")
    theta = float(fields.get("rope_theta") or THETA)
    plain = [theta ** (-2 * n / head_dim) for n in range(head_dim // 2)]
    context = int(raw["max_position_embeddings"])
    try:
        return rule(plain, fields | {"rope_theta": theta}, context)
    except KeyError as error:
        raise EngineStartError(f"config.json: rope type {kind!r} lacks {error}") from error


def _fields(raw: Fields) -> dict[str, Any]:
    """`rope_scaling` as it always was, or `rope_parameters` of transformers 5, which also holds theta; what stands
    beside them counts where they are silent, but for the original length, which some families keep outside."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise EngineStartError(f"config.json: rope_scaling must be an object, not {str(given)[:80]!r}")
    for name in sorted(NUMBERS & given.keys()):
        if given[name] is not None and (type(given[name]) not in (int, float) or not 0 <= given[name] < math.inf):
            raise EngineStartError(f"config.json: rope_scaling: {name} must be a number, not {given[name]!r}")
    fields = dict(given)
    for name in ("rope_theta", "partial_rotary_factor"):
        fields.setdefault(name, raw.get(name))
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    return fields | {"original_max_position_embeddings": int(original or raw["max_position_embeddings"])}


def _default(plain: list[float], fields: Fields, context: int) -> Rope:
    return Rope(tuple(plain), 1.0, context)


def _linear(plain: list[float], fields: Fields, context: int) -> Rope:
    """All positions are stretched."""
    return Rope(tuple(frequency / fields["factor"] for frequency in plain), 1.0, context)


def _dynamic(plain: list[float], fields: Fields, context: int) -> Rope:
    """Nothing changes up to max_position_embeddings, and there the context ends."""
    return Rope(tuple(plain), 1.0, context)


def _llama3(plain: list[float], fields: Fields, context: int) -> Rope:
    """Slow frequencies are stretched, fast ones are not, between them it fades over."""
    factor, original = fields["factor"], fields["original_max_position_embeddings"]
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]

    def scaled(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)  # in the length that it was trained with
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        return float((1 - smooth) * frequency / factor + smooth * frequency)

    return Rope(tuple(map(scaled, plain)), 1.0, context)


def _yarn(plain: list[float], fields: Fields, context: int) -> Rope:
    """Like llama3 with another fade, over the number of the pair; and attention gets sharper with the stretch."""
    original = fields["original_max_position_embeddings"]
    factor = float(fields["factor"] or context / original)
    dim, log_theta = 2 * len(plain), math.log(fields["rope_theta"])

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * log_theta)

    low, high = pair_that_turns(fields.get("beta_fast") or 32), pair_that_turns(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001

    def scaled(pair: int, frequency: float) -> float:
        stretched = min(1.0, max(0.0, (pair - low) / width))
        return stretched * frequency / factor + (1 - stretched) * frequency

    frequencies = tuple(scaled(pair, frequency) for pair, frequency in enumerate(plain))
    # Qwen's cards tell people to add the scaling and to leave max_position_embeddings as it was.
    return Rope(frequencies, _yarn_attention(fields, factor), max(context, round(original * factor)))


def _yarn_attention(fields: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    numerator, denominator = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)


def _longrope(plain: list[float], fields: Fields, context: int) -> Rope:
    """Each pair has its own stretch: one list up to the original length, one beyond."""
    short, long = fields["short_factor"], fields["long_factor"]
    original = fields["original_max_position_embeddings"]
    if len(short) != len(plain) or len(long) != len(plain):
        raise ValueError(f"short_factor and long_factor need {len(plain)} numbers each")
    factor = float(fields.get("factor") or context / original)
    attention = fields.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    frequencies = tuple(frequency / stretch for frequency, stretch in zip(plain, short, strict=True))
    return Rope(frequencies, float(attention), context if short == long else min(context, original))


RULES: dict[str, tuple[Callable[[list[float], Fields, int], Rope], set[str]]] = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": (
        _yarn,
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (_longrope, {"factor", "attention_factor", "short_factor", "long_factor"}),
}
