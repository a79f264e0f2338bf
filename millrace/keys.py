"""`millrace keys`: API keys are shown once, at their creation; the server keeps only a hash."""

import argparse
import datetime
from pathlib import Path
from typing import Any

import orjson

from bus.api_keys import ApiKeyError, ApiKeys, KeyLimits, KeyRecord, hash_key
from bus.link import ServerAddress, client
from bus.settings import Settings
from millrace.local_key import key_path, read_key
from millrace.preflight import CannotStart
from millrace.table import to_table


async def run_keys(settings: Settings, options: argparse.Namespace) -> int:
    """Raises CannotStart and LinkError."""
    async with client(ServerAddress.parse(settings.redis_url)) as redis:
        keys = ApiKeys(redis)
        try:
            match options.action:
                case "create":
                    await _create(keys, options)
                case "list":
                    await _list(keys, options)
                case "revoke":
                    await _revoke(keys, options, Path(settings.var_dir))
        finally:
            await keys.close()
    return 0


async def _create(keys: ApiKeys, options: argparse.Namespace) -> None:
    limits = KeyLimits(jobs_max=max(options.jobs_max, 0), rate_per_minute=max(options.rate, 0))
    try:
        created = await keys.create(options.scope, user=options.user, limits=limits)
    except ApiKeyError as error:
        raise CannotStart(str(error)) from error
    if options.json:
        _print_json({**to_json(created.record), "key": created.key})
        return
    print(f"id      {created.record.id}\nscopes  {', '.join(sorted(created.record.scopes))}\nkey     {created.key}")
    print("\nThis key is shown once; keep it now.")


async def _list(keys: ApiKeys, options: argparse.Namespace) -> None:
    records = await keys.list()
    if options.json:
        _print_json([to_json(record) for record in records])
        return
    rows = [[one.id, ",".join(sorted(one.scopes)), one.user, _day(one.created_ms), _limits(one)] for one in records]
    print(to_table(["id", "scopes", "user", "created", "limits"], rows))


async def _revoke(keys: ApiKeys, options: argparse.Namespace, var_dir: Path) -> None:
    """The key of this machine's fleet also loses its file, or `millrace up` would register it again."""
    revoked = await keys.revoke(options.id)
    local = read_key(var_dir)
    if revoked and local is not None and hash_key(local).startswith(options.id):
        key_path(var_dir).unlink(missing_ok=True)
        await keys.revoke(options.id)  # the fleet may have registered it again just before
    if options.json:
        _print_json({"id": options.id, "revoked": revoked})
    elif revoked:
        print(f"revoked {options.id}; gateways refuse it within seconds")
    if not revoked:
        raise CannotStart(f"there is no key with the id {options.id}: `millrace keys list` shows them")


def to_json(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "scopes": sorted(record.scopes),
        "user": record.user,
        "created_ms": record.created_ms,
        "jobs_max": record.limits.jobs_max,
        "rate_per_minute": record.limits.rate_per_minute,
    }


def _limits(record: KeyRecord) -> str:
    limits = record.limits
    parts = [
        f"{limits.jobs_max} jobs" if limits.jobs_max else "",
        f"{limits.rate_per_minute}/min" if limits.rate_per_minute else "",
    ]
    return ", ".join(part for part in parts if part) or "none"


def _day(created_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(created_ms / 1000):%Y-%m-%d %H:%M}"


def _print_json(value: Any) -> None:
    print(orjson.dumps(value).decode())
