"""`millrace settings`: all settings, defaults and what is set now; with --markdown the table of the README."""

import dataclasses

from bus.settings import Settings, env_name
from millrace.table import to_table

SECRETS = frozenset({"redis_url"})  # may hold a password


def settings_markdown() -> str:
    """One table for all settings, grouped as in bus/settings.py."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    group = ""
    for setting in dataclasses.fields(Settings):
        if setting.metadata["group"] != group:
            group = setting.metadata["group"]
            lines.append(f"| **{group}** | | |")
        shown = _shown(setting.default)
        lines.append(f"| `{env_name(setting)}` | {f'`{shown}`' if shown else ''} | {setting.metadata['doc']} |")
    return "\n".join(lines)


def settings_text(settings: Settings) -> str:
    """Name, value now and default; a `*` marks what differs from the default."""
    rows = []
    for setting in dataclasses.fields(Settings):
        value = getattr(settings, setting.name)
        differs = value != setting.default
        shown = "(set)" if differs and setting.name in SECRETS else _shown(value)
        rows.append(["*" if differs else " ", env_name(setting), shown, _shown(setting.default)])
    return to_table(["", "setting", "value", "default"], rows)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(value)
