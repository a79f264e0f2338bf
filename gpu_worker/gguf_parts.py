"""Which files a GGUF model lies in, by name alone: `<name>.gguf`, or `<name>-00001-of-00003.gguf` and so on."""

import re
from pathlib import Path

from gpu_worker.engine import EngineStartError

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def parts_of(source: Path) -> list[Path]:
    """All files of the model that `source` is the first file of. Raises EngineStartError on another one, or a gap."""
    match = PART.search(source.name)
    if match is None:
        return [source]
    number, count = int(match[1]), int(match[2])
    if number != 1:
        raise EngineStartError(f"{source.name} is part {number} of {count}: name the first part")
    stem = source.name[: match.start()]
    parts = [source.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = next((part.name for part in parts if not part.is_file()), None)
    if missing:
        raise EngineStartError(f"{source.parent}: {missing} is missing, one of {count} parts of the model")
    return parts
