"""The stall that a client sees when the worker's process is killed in mid-stream.

    python -m benchmarks.stall [--kills 20] [--streams 16]

Two echo workers, streams of one token each 20 ms through the gateway; `kill -9` of one worker's process. Printed: the
longest gap between two pieces of each stream that ran on the killed worker, beside the longest gap of the streams
that did not. Every answer is compared with the one that an undisturbed fleet gives.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.echo_fleet import MODEL, EchoFleet, running_echo_fleet

DELAY_MS = 20
TOKENS = 100


async def stream(fleet: EchoFleet, session: aiohttp.ClientSession, number: int) -> tuple[str, float]:
    """The answer's text, and the longest gap between two pieces in seconds."""
    prompt = f"[[tokens={TOKENS} delay_ms={DELAY_MS}]] stream number {number} says"
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
    text, gap, last = "", 0.0, 0.0
    async with session.post(f"{fleet.gateway_url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if piece:
                now = time.perf_counter()
                gap = max(gap, now - last) if last else 0.0
                last = now
                text += piece
    return text, gap


async def all_streams(fleet: EchoFleet, session: aiohttp.ClientSession, count: int) -> list[tuple[str, float]]:
    return await asyncio.gather(*(stream(fleet, session, number) for number in range(count)))


def show(name: str, gaps: list[float]) -> None:
    if len(gaps) < 2:
        print(f"{name}: {len(gaps)} streams")
        return
    cuts = statistics.quantiles(gaps, n=100)
    figures = f"p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms, max {max(gaps) * 1000:.0f} ms"
    print(f"{name}: longest gap {figures} ({len(gaps)} streams)", flush=True)


async def run(kills: int, streams: int) -> None:
    killed: list[float] = []
    others: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with running_echo_fleet(Path(folder), workers=2, capacity=256, gateway=True) as fleet:
            headers = {"Authorization": f"Bearer {fleet.api_key}"}
            async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
                expected = [text for text, _ in await all_streams(fleet, session, streams)]
                for kill in range(kills):
                    running = asyncio.create_task(all_streams(fleet, session, streams))
                    await asyncio.sleep(TOKENS * DELAY_MS / 1000 * 0.4)
                    victim = fleet.workers[kill % 2]
                    pid = await asyncio.to_thread(victim.kill_child)
                    answers = await running
                    if [text for text, _ in answers] != expected:
                        raise SystemExit(f"kill {kill}: an answer differs from the one without a kill")
                    gaps = sorted((gap for _, gap in answers), reverse=True)
                    killed += gaps[: streams // 2]
                    others += gaps[streams // 2 :]
                    await asyncio.to_thread(victim.child_pid, other_than=pid)
                    await asyncio.sleep(1.0)
    print(f"{kills} kills of a worker process, {streams} streams each, a token each {DELAY_MS} ms; all answers whole")
    show("streams on the killed worker", killed)
    show("streams on the other worker", others)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=16)
    flags = parser.parse_args()
    uvloop.run(run(flags.kills, flags.streams))


if __name__ == "__main__":
    main()
