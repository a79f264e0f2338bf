"""The Lua scripts, each one change of state on one slot, safe to repeat.

A script file names the shared parts it stands on in its first lines: `-- use: <part>`; parts are files that begin
with an underscore and are put in front, in that order, once each. `_base.lua` is always first.
"""

from functools import cache
from importlib import resources

from bus.link.script import Script

_USE = "-- use: "


def script_names() -> list[str]:
    """All scripts by name, shared parts left out."""
    files = (entry.name for entry in resources.files(__package__).iterdir())
    return sorted(name[:-4] for name in files if name.endswith(".lua") and not name.startswith("_"))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def _parts(source: str) -> list[str]:
    """The shared parts a source stands on, those of its parts first, each once."""
    parts: list[str] = []
    for line in source.splitlines():
        for word in line[len(_USE) :].split() if line.startswith(_USE) else ():
            parts += [part for part in [*_parts(_read(word)), word] if part not in parts]
    return parts


def _strip(source: str) -> str:
    """Without whole-line comments and blank lines: the source travels at each EVAL."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--"))


@cache
def load_script(name: str) -> Script:
    """The script with its shared parts in front. Raises FileNotFoundError for an unknown name."""
    source = _read(name)
    parts = ["_base", *_parts(source)]
    text = "\n".join([_strip(_read(part)) for part in parts] + [_strip(source)])
    return Script(name, text)
