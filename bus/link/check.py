"""Is this server fit to carry Millrace? Asked once by every role at its start."""

from collections.abc import Mapping

from bus.link.address import Kind, ServerAddress
from bus.link.dial import ServerInfo, dial
from bus.link.errors import LinkDown, ServerError, ServerUnfit

VERSION_MIN = (6, 2)


async def check_server(address: ServerAddress, *, timeout_s: float = 5.0) -> ServerInfo:
    """Raises ServerUnfit with one line that says what to do: unreachable, login refused, too old, evicting."""
    try:
        wire, info = await dial(address, name="millrace-check", cell_key="", timeout_s=timeout_s)
    except ServerError as error:
        raise ServerUnfit(describe_login_error(address, error)) from error
    except LinkDown as error:
        raise ServerUnfit(f"cannot reach the server at {address} ({error}): start it, or correct REDIS_URL") from error
    await wire.release()
    if problem := find_problem(info.fields, address):
        raise ServerUnfit(problem)
    return info


def find_problem(fields: Mapping[str, str], address: ServerAddress) -> str | None:
    """The first thing in INFO that Millrace cannot work with."""
    version = fields.get("redis_version", "0")
    if parse_version(version) < VERSION_MIN:
        return f"the server at {address} is version {version}: Millrace needs Redis 6.2 or newer, or Valkey"
    policy = fields.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return (
            f"the server at {address} has maxmemory-policy {policy} and would evict jobs: "
            "set it to noeviction (CONFIG SET maxmemory-policy noeviction)"
        )
    clustered = fields.get("cluster_enabled", "0") == "1"
    if clustered and address.kind is not Kind.CLUSTER:
        return f"the server at {address} is a cluster node: write redis+cluster:// in REDIS_URL"
    if not clustered and address.kind is Kind.CLUSTER:
        return f"the server at {address} is no cluster: write redis:// in REDIS_URL"
    return None


def describe_login_error(address: ServerAddress, error: ServerError) -> str:
    if error.code == "NOPERM":
        return f"the user of {address} lacks a permission ({error.message}): allow it with ACL SETUSER"
    if error.code in {"WRONGPASS", "NOAUTH"} or "AUTH" in error.message:
        return f"the server at {address} refuses the login ({error.message}): correct user and password in REDIS_URL"
    return f"the server at {address} refuses to serve ({error}): correct REDIS_URL"


def parse_version(text: str) -> tuple[int, int]:
    numbers = [int(part) if part.isascii() and part.isdigit() else 0 for part in (*text.split("."), "0", "0")[:2]]
    return numbers[0], numbers[1]


def find_warning(address: ServerAddress) -> str | None:
    """What an operator should hear at the start, though it works."""
    if address.is_local:
        return None
    missing = [name for name, there in (("a password", address.password), ("TLS", address.tls)) if not there]
    if not missing:
        return None
    return f"REDIS_URL is on another machine without {' and '.join(missing)}: whoever reaches it can read every chat"
