"""A gateway as a process: what it says when it cannot start, and how it ends."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp

from bus.api_keys import ApiKeys
from bus.link import ServerAddress, client
from tests.conftest import wait_until
from tests.gateway.conftest import MODEL
from tests.gateway.test_chatting import read_events, text_of
from tests.harness.fleet import Fleet
from tests.harness.servers import ValkeyServer, free_port


def test_a_taken_port_is_one_line_that_says_what_to_do(server: ValkeyServer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "gateway", "--port", str(port)],
            env={"REDIS_URL": server.url, "MILLRACE_VAR_DIR": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "MILLRACE_GATEWAY_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_stopping_gateway_lets_open_streams_end_and_then_goes(server: ValkeyServer, tmp_path: Path) -> None:
    """SIGTERM: not ready at once, the open stream ends whole, the process ends by itself."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    async with client(ServerAddress.parse(server.url)) as redis:
        key = (await ApiKeys(redis).create(["chat"])).key
    with Fleet(server.url, tmp_path, drain_grace_ms=3_000, echo_models=MODEL, model=MODEL) as fleet:
        fleet.start("registry_consumer")
        fleet.start("dispatcher")
        fleet.start("gpu_worker", "--engine", "echo")
        gateway = fleet.start("gateway", "--port", str(port))
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
            await wait_until(lambda: answers(http, base, 200), timeout_s=20)
            body = {"stream": True, "messages": [{"role": "user", "content": "[[delay_ms=40 tokens=30]] a b c"}]}
            async with http.post(f"{base}/v1/chat/completions", json=body) as got:
                shown = await read_events(got, most=3)
                gateway.process.send_signal(signal.SIGTERM)
                await wait_until(lambda: answers(http, base, 503))
                rest = await read_events(got)

            assert (text_of(shown) + text_of(rest)).split() == list("abc") * 10
            assert rest[-1]["data"] == "[DONE]"
        assert await asyncio.to_thread(gateway.process.wait, 5) == 0


async def answers(http: aiohttp.ClientSession, base: str, status: int) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with http.get(f"{base}/ready") as response:
            return response.status == status
    return False
