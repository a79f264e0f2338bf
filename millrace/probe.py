"""Is a gateway ready? One small HTTP request, without a client library."""

import asyncio

TIMEOUT_S = 3.0
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


async def is_ready(host: str, port: int) -> str:
    """ "" if /ready answers 200, otherwise why not."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            status, body = await _get(LOOPBACK_OF.get(host, host), port, "/ready")
    except TimeoutError:
        return "it does not answer"
    except (OSError, ValueError, IndexError) as error:
        return f"it is not listening yet ({error.__class__.__name__})"
    return "" if status == 200 else body.strip()[:300] or f"status {status}"


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read(64 * 1024)
        while not reader.at_eof():
            more = await reader.read(64 * 1024)
            answer = (answer + more)[: 64 * 1024]
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode("utf-8", "replace")
