"""The fleet that a process joined without being told a server: that of its var folder, as long as it runs.

`millrace up` writes the address of its server to `<var_dir>/redis-url` and withdraws it when it stops. A process that
read it there (`bus.settings.read_settings`) belongs to that fleet and ends with it; one with a REDIS_URL of its own
waits for its server for ever.
"""

from collections.abc import Mapping
from pathlib import Path

from bus.settings import SERVER_URL_FILE, Settings


class JoinedFleet:
    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self._url = url

    def stands(self) -> bool:
        """False once it has been stopped, or another one with another server has taken its place."""
        try:
            return self.path.read_text(encoding="utf-8").strip() == self._url
        except OSError:
            return False


def joined_fleet(settings: Settings, environ: Mapping[str, str]) -> JoinedFleet | None:
    """None for a process that was told its server. environ: from which `settings` were read."""
    if environ.get("REDIS_URL", "").strip():
        return None
    return JoinedFleet(Path(settings.var_dir) / SERVER_URL_FILE, settings.redis_url)
