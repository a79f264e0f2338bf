"""What `millrace up` prints when a chat can be served; every line can be pasted."""

from collections.abc import Mapping

from bus.settings import Settings
from millrace.probe import LOOPBACK_OF


def banner(settings: Settings, ports: Mapping[str, int], key: str, url: str) -> list[str]:
    host = LOOPBACK_OF.get(settings.gateway_host, settings.gateway_host)
    shown = f"[{host}]" if ":" in host else host
    addresses = [f"http://{shown}:{port}" for port in ports.values()]
    base = addresses[0] if addresses else ""
    return [
        "",
        "Millrace is ready.",
        "",
        f"  address    {'   '.join(addresses)}",
        f"  API key    {key}",
        f"  REDIS_URL  {url}",
        "",
        f"  export BASE={base} KEY={key}",
        f"  export REDIS_URL='{url}'   # redis-cli -u \"$REDIS_URL\" ping",
        "",
        f"  curl {base}/v1/chat/completions -H 'Authorization: Bearer {key}' \\",
        "       -H 'Content-Type: application/json' \\",
        '       -d \'{"messages": [{"role": "user", "content": "Hello!"}]}\'',
        "",
    ]
