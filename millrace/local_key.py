"""The API key of this machine's fleet: made once, kept in `<var_dir>/api-key`, restored after a flush."""

import asyncio
import contextlib
import logging
from pathlib import Path

from bus.api_keys import ApiKeys, new_key
from bus.link import LinkError, ServerAddress, client
from millrace.embedded import write_private

SCOPES = ("chat", "node")
CHECK_S = 2.0

log = logging.getLogger(__name__)


def key_path(var_dir: Path) -> Path:
    return var_dir / "api-key"


def read_key(var_dir: Path) -> str | None:
    try:
        return key_path(var_dir).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def made_key(var_dir: Path) -> str:
    """The key of last time, or a new one."""
    key = read_key(var_dir)
    if key is None:
        key = new_key()
        write_private(key_path(var_dir), key + "\n")
    key_path(var_dir).chmod(0o600)
    return key


async def keep_key_known(address: ServerAddress, var_dir: Path) -> None:
    """Until cancelled: register the key whenever the server does not know it (after FLUSHALL or lost data).

    Reads the file each time: once it is gone (`millrace keys revoke` removes it), nothing is restored.
    """
    while True:
        with contextlib.suppress(LinkError):  # the roles report a lost server; here the next look is soon enough
            await register_key(address, var_dir)
        await asyncio.sleep(CHECK_S)


async def register_key(address: ServerAddress, var_dir: Path) -> None:
    """Make the key of the file valid, if there is one and the server does not know it. Raises LinkError."""
    key = read_key(var_dir)
    if key is None:
        return
    async with client(address, connections_max=1) as redis:
        keys = ApiKeys(redis, cache_s=0)
        try:
            if await keys.check(key) is None:
                made_ms = int(key_path(var_dir).stat().st_mtime * 1000)
                created = await keys.create(SCOPES, user="local", key=key, created_ms=made_ms)
                log.info("api key registered", extra={"id": created.record.id})
        except FileNotFoundError:
            return  # revoked at this moment
        finally:
            await keys.close()
