"""Error replies that mean *not executed*: what the link may safely send again, and what must happen first.

Everything else is an answer for the caller. A script is checked for its keys' slot, for a loaded body, for memory and
for a writable server before its first line runs, so each of these says that nothing of it has happened.
"""

from dataclasses import dataclass

from bus.link.address import Endpoint


@dataclass(frozen=True, slots=True)
class Unknown:
    """NOSCRIPT: send the body."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """MOVED: another node owns the slot now. READONLY, LOADING, MASTERDOWN, CLUSTERDOWN: ask again who does (None)."""

    endpoint: Endpoint | None


@dataclass(frozen=True, slots=True)
class Asking:
    """ASK: the slot is on its way; this one command goes to `endpoint`, the slot's owner stays."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Later:
    """TRYAGAIN: half of the keys have moved. The same again in a moment."""


Refusal = Unknown | Elsewhere | Asking | Later


def parse_refusal(error: str, asked: Endpoint) -> Refusal | None:
    """None: the error is the command's answer. asked: the node that sent it; an empty host in MOVED means the same."""
    words = error.split(" ")
    match words[0]:
        case "NOSCRIPT":
            return Unknown()
        case "MOVED" if len(words) >= 3:
            return Elsewhere(_target(words[2], asked))
        case "ASK" if len(words) >= 3:
            return Asking(_target(words[2], asked))
        case "TRYAGAIN":
            return Later()
        case "READONLY" | "LOADING" | "MASTERDOWN" | "CLUSTERDOWN":
            return Elsewhere(None)
        case _:
            return None


def _target(text: str, asked: Endpoint) -> Endpoint:
    host, _, port = text.rpartition(":")
    return Endpoint(host.strip("[]") or asked.host, int(port))
