"""docs/protocol.md lists what the scripts read and write: every field, every entry, every script, every reason."""

import re
from pathlib import Path

import pytest

from bus.cell.view import FULL_FIELDS, SHORT_FIELDS
from bus.scripts import load_script, script_names

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]*)`", DOCUMENT))))
SOURCES = {name: load_script(name).source for name in script_names()}


def fields_written() -> set[str]:
    """Names in HSET, HGET and HMGET calls of the scripts, found in their text."""
    found: set[str] = set()
    for source in SOURCES.values():
        for call in re.findall(r"call\('(?:HSET|HGET|HMGET)',([^\n]*(?:\n[^\n]*)?)\)", source):
            found |= set(re.findall(r"'([a-z_]+)'", call))
    return found


def arguments(source: str, opening: str) -> list[str]:
    """The text between the parentheses of each call that begins with `opening`."""
    found = []
    for match in re.finditer(re.escape(opening), source):
        depth, at = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[at], 0)
            at += 1
        found.append(source[match.end() : at])
    return found


def entry_fields() -> set[str]:
    """Names in XADD calls and in appends to out-streams."""
    found: set[str] = set()
    for source in SOURCES.values():
        for opening in ("call('XADD',", "try('XADD',", "send("):
            for call in arguments(source, opening):
                found |= set(re.findall(r"'([a-z_]+)'", call))
    return found


@pytest.mark.parametrize("name", script_names())
def test_every_script_is_described(name: str):
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("name", sorted(fields_written() | set(SHORT_FIELDS) | set(FULL_FIELDS)))
def test_every_hash_field_is_described(name: str):
    assert name in WORDS


@pytest.mark.parametrize("name", sorted(entry_fields()))
def test_every_field_of_an_entry_is_described(name: str):
    assert name in WORDS


def test_the_search_for_fields_finds_some():
    assert {"state", "fence", "route", "place", "spec", "owner"} <= fields_written()
    assert {"job", "fence", "offset", "text_len"} <= entry_fields()


@pytest.mark.parametrize("name", script_names())
def test_no_script_names_a_command_that_is_younger_than_redis_6_2(name: str):
    """Redis only (XACKDEL, XNACK, DELEX ...) or 7.0 and later (PEXPIRE GT, SET NX GET ...) would split the field."""
    commands = set(re.findall(r"(?:call|try)\('([A-Z]+)'", SOURCES[name]))

    assert commands <= {
        *(
            "INFO",
            "TIME",
            "PTTL",
            "PEXPIRE",
            "PEXPIREAT",
            "TYPE",
            "EXISTS",
            "DEL",
            "COPY",
            "GET",
            "SET",
            "STRLEN",
            "APPEND",
        ),
        *("HGET", "HSET", "HMGET", "HDEL", "HVALS", "HINCRBY", "SADD", "SREM"),
        *("ZADD", "ZREM", "ZCARD", "ZCOUNT", "ZSCORE", "ZRANGE", "ZRANGEBYSCORE", "ZREMRANGEBYSCORE"),
        *("XADD", "XTRIM", "XDEL", "XACK", "XLEN", "XRANGE", "XPENDING", "XINFO", "XGROUP"),
    }
