"""What a worker's node is called on this machine. Imported by the parent, so it must stay light."""

import platform
import re
from collections.abc import Iterable

from bus.settings import Settings

NAMES_MAX = 64  # workers of one kind on one machine


def node_names(settings: Settings) -> Iterable[str]:
    """The name given, or "<host>-<engine>-<n>" with the first n that no process here has taken."""
    return [settings.node_id] if settings.node_id else default_names(settings)


def is_default_name(settings: Settings) -> bool:
    """Whether another one would do as well, should somebody else have it."""
    return settings.node_id in default_names(settings)


def default_names(settings: Settings) -> list[str]:
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node())[:40] or "node"
    return [f"{host}-{settings.engine}-{number}" for number in range(1, NAMES_MAX + 1)]
