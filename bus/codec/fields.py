"""Typed reading of stream entries: the shapes that ours have, and the reason why another one is foreign.

Anybody may XADD to a stream, and whatever a reader lets through reaches arithmetic and scripts. So each field is read
by its type here, once, where it enters: a value that came through can be used without another look. Every function
raises ValueError, or KeyError for a field that is missing; the parsers make a ForeignEntry with the reason of both.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

from bus.ids import JOB_ID_PATTERN, Fence, Holder, JobId, NodeId, is_model_name, is_node_id
from bus.keys import PRIORITIES, QueueName, queue_model, queue_name

Fields = Mapping[str, bytes]

COUNT_MAX = 10**9  # lengths, token counts and estimates
MOMENT_MAX = 10**14  # ms since 1970; Lua writes numbers with 14 digits, so a larger one would come back as another
NAMES_KEPT = 1_000

_is_fence = re.compile(r"\d{1,9}\.[0-9a-z]{1,32}", re.ASCII).fullmatch
_is_entry_id = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII).fullmatch
_is_out = re.compile(r"(?:gateway|reply):[A-Za-z0-9_.:-]{1,160}").fullmatch
_is_holder = re.compile(r"[A-Za-z0-9_.:-]{1,160}").fullmatch
_is_digest = re.compile(r"[!-~]{0,160}").fullmatch
_is_capability = re.compile(r"[a-z0-9_]{1,32}").fullmatch
_is_job_id = JOB_ID_PATTERN.fullmatch


def within(number: int, most: int, least: int = 0) -> int:
    """Raises ValueError if the number is not least..most."""
    if not least <= number <= most:
        raise ValueError(f"a number is not within {least}..{most}")
    return number


def count(fields: Fields, name: str, most: int = COUNT_MAX) -> int:
    number = int(fields[name])
    if not 0 <= number <= most:
        raise ValueError(f"{name} is not within 0..{most}")
    return number


def moment(fields: Fields, name: str) -> int:
    return count(fields, name, MOMENT_MAX)


def text(fields: Fields, name: str, most: int) -> str:
    raw = fields[name]
    if len(raw) > most:
        raise ValueError(f"{name} is longer than {most} bytes")
    return raw.decode()


def job_id(fields: Fields) -> JobId:
    word = fields["job"].decode()
    if _is_job_id(word) is None:
        raise ValueError(f"job {word[:40]!r} is no job id")
    return JobId(word)


def fence(fields: Fields) -> Fence:
    word = fields["fence"].decode()
    if _is_fence(word) is None:
        raise ValueError(f"fence {word[:40]!r} is not <attempt>.<nonce>")
    return Fence(word)


def entry_id(fields: Fields, name: str) -> str:
    word = fields[name].decode()
    if _is_entry_id(word) is None:
        raise ValueError(f"{name} {word[:40]!r} is no entry id")
    return word


def out(fields: Fields) -> str:
    word = fields["out"].decode()
    if not is_out(word):
        raise ValueError(f"out {word[:40]!r} is neither gateway:<id> nor reply:<name>")
    return word


def holder(fields: Fields, name: str) -> Holder:
    word = fields[name].decode()
    if not is_holder(word):
        raise ValueError(f"{name} {word[:40]!r} is no holder")
    return Holder(word)


def node_ids(fields: Fields, name: str) -> tuple[NodeId, ...]:
    words = fields[name].decode().split()
    if not all(map(is_node_id, words)):
        raise ValueError(f"{name} holds what is no node id")
    return tuple(map(NodeId, words))


def capabilities(fields: Fields, name: str) -> tuple[str, ...]:
    """Names, perhaps of a later release; none if there is no such field."""
    words = tuple(fields.get(name, b"").decode().split())
    if not all(map(is_capability, words)):
        raise ValueError(f"{name} holds what is no capability")
    return words


def digest(fields: Fields, name: str) -> str:
    word = fields[name].decode()
    if not is_digest(word):
        raise ValueError(f"{name} {word[:40]!r} is no digest")
    return word


def is_out(word: str) -> bool:
    """Whether this names an out-stream."""
    return _is_out(word) is not None


def is_holder(word: str) -> bool:
    """Holders stand between blanks in the job hash, so they have none."""
    return _is_holder(word) is not None


def is_digest(word: str) -> bool:
    return _is_digest(word) is not None


def is_capability(word: str) -> bool:
    """Names of capabilities stand between blanks, and before a colon."""
    return _is_capability(word) is not None


@lru_cache(NAMES_KEPT)
def is_queue_name(word: str) -> bool:
    """Whether a queue can have this name: "<model>:<priority>"."""
    model = queue_model(QueueName(word))
    return is_model_name(model) and word in {queue_name(model, priority) for priority in PRIORITIES}
