"""Break a fleet at random for minutes, and check every answer: nothing lost, nothing twice, nothing left behind.

    python -m benchmarks.soak [--minutes 10] [--seed N] [--clients 40]

An own server (AOF everysec), two of each role, echo workers whose answer is a function of the prompt. Faults come from
a seeded schedule: kill -9 of any role's process, frozen processes that wake as zombies, kill -9 of the server, dropped
connections, flushed scripts, destroyed consumer groups, FLUSHALL. Each client streams one chat after another and
compares offsets and words. Exit code 1 with the seed at the first wrong answer, or if anything is left at the end.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import uvloop

from bus.link import LinkError, ServerAddress, client
from bus.settings import Settings
from millrace import ChatError, Client
from tests.harness.fleet import QUICK, Fleet, children_of
from tests.harness.servers import ValkeyServer
from tests.harness.waiting import wait_until

MODEL = "echo"
TOKENS = 15
DEADLINE_S = 60.0
# Short, but well above the 2 s that a link may wait between two attempts to reach a server that is away.
TIMES = {**QUICK, "lease_ms": 4_000, "renew_ms": 800, "self_fence_ms": 3_200, "unread_ms": 2_500}
# A frozen worker must be away for longer than its lease to wake up as a zombie.
FREEZE_S = (0.2, 1.7 * TIMES["lease_ms"] / 1000)


class Soak:
    def __init__(self, server: ValkeyServer, fleet: Fleet, seed: int) -> None:
        self.server = server
        self.fleet = fleet
        self.chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.longest_s = 0.0
        self.number = 0

    # the clients

    async def chat(self, chats: Client) -> None:
        """One streamed chat, checked word by word."""
        self.number += 1
        words = f"job number {self.number} says"
        started = time.monotonic()
        text = ""
        try:
            async for piece in chats.stream(
                f"[[tokens={TOKENS} delay_ms=20]] {words}", model=MODEL, deadline_s=DEADLINE_S
            ):
                text += piece.text
                if piece.offset != len(text.encode()):
                    raise WrongAnswer(f"{words}: offset {piece.offset} after {text!r}")
        except ChatError as error:
            # Only an honest refusal is accepted: the fleet was wiped, or away for long.
            if error.code not in ("no_model", "no_node", "unavailable", "queue_full") or text:
                raise WrongAnswer(f"{words}: {error.code}: {error} after {text!r}") from error
            self.ends[f"refused: {error.code}"] += 1
            await asyncio.sleep(0.2)
            return
        expected = (words.split() * TOKENS)[:TOKENS]
        if text.split() != expected:
            raise WrongAnswer(f"{words}: {text!r}")
        self.ends["whole"] += 1
        self.longest_s = max(self.longest_s, time.monotonic() - started)

    async def client(self, chats: Client, until: float) -> None:
        while time.monotonic() < until:
            await self.chat(chats)

    # the faults

    async def break_things(self, until: float) -> None:
        faults: list[tuple[Callable[[], object], float]] = [
            (self.kill_role, 8),
            (self.freeze_role, 4),
            (self.kill_server, 1),
            (self.drop_connections, 2),
            (self.flush_scripts, 1),
            (self.destroy_group, 1),
            (self.wipe, 0.5),
        ]
        while time.monotonic() < until:
            await asyncio.sleep(self.chance.uniform(0.3, 2.0))
            [fault] = self.chance.choices([one for one, _ in faults], [weight for _, weight in faults])
            self.faults[fault.__name__] += 1
            await asyncio.to_thread(fault)

    def any_child(self) -> int:
        """A child that runs now; parents of others wait before they start the next one."""
        return self.chance.choice([pid for role in self.fleet.roles for pid in children_of(role.process.pid)])

    def kill_role(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.any_child(), signal.SIGKILL)

    def freeze_role(self) -> None:
        pid = self.any_child()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(*FREEZE_S))
            os.kill(pid, signal.SIGCONT)

    def kill_server(self) -> None:
        self.server.kill()
        time.sleep(self.chance.uniform(0.0, 1.0))
        self.server.start(timeout_s=60)  # it reads its log again

    def drop_connections(self) -> None:
        self.server.call("CLIENT", "KILL", "TYPE", "normal")

    def flush_scripts(self) -> None:
        self.server.call("SCRIPT", "FLUSH")

    def destroy_group(self) -> None:
        key, group = self.chance.choice([("nodes", "registry_consumer"), ("jobs", "dispatcher")])
        self.server.call("XGROUP", "DESTROY", f"millrace:{{c0}}:{key}", group)

    def wipe(self) -> None:
        self.server.call("FLUSHALL")

    # the end

    async def leftovers(self) -> str:
        """What is still there once everybody has his answer; empty if nothing is."""
        left: Counter[str] = Counter()
        async with client(ServerAddress.parse(self.server.url)) as redis:
            async for key in redis.scan_iter(match="millrace:{c0}:node:*:running"):
                left["reservations"] += await redis.zcard(key)
            async for key in redis.scan_iter(match="millrace:{c0}:node:*:jobs"):
                left["node entries"] += await redis.xlen(key)
            async for key in redis.scan_iter(match="millrace:{c0}:queue:*"):
                left["queued"] += await redis.xlen(key)
        return ", ".join(f"{count} {what}" for what, count in left.items() if count)


class WrongAnswer(Exception):
    """The one thing that must not happen."""


async def run(minutes: float, seed: int, clients: int) -> int:
    settings = Settings().changed(**TIMES)
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(aof="everysec") as server:
        with Fleet(server.url, Path(folder), model=MODEL, capacity=32, log_level="warning", **TIMES) as fleet:
            for role in ("registry_consumer", "dispatcher"):
                fleet.start(role)
                fleet.start(role)
            for number in (1, 2):
                fleet.start("gpu_worker", "--engine", "echo", node_id=f"echo-{number}")
            soak = Soak(server, fleet, seed)
            async with Client(server.url, settings=settings) as chats:
                await wait_until(lambda: _serves(chats), timeout_s=30, step_s=0.2)
                until = time.monotonic() + minutes * 60
                async with asyncio.TaskGroup() as group:
                    group.create_task(soak.break_things(until))
                    for _ in range(clients):
                        group.create_task(soak.client(chats, until))
            for _ in range(100):
                if not (left := await soak.leftovers()):
                    break
                await asyncio.sleep(0.1)
            print(f"seed {seed}: answers {dict(soak.ends)}, slowest {soak.longest_s:.1f} s, faults {dict(soak.faults)}")
            if left:
                print(f"left behind: {left}", file=sys.stderr)
            return 1 if left else 0


async def _serves(chats: Client) -> bool:
    try:
        return bool((await chats.chat("[[tokens=1]] ready", model=MODEL, deadline_s=2)).text)
    except (ChatError, LinkError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--clients", type=int, default=40)
    flags = parser.parse_args()
    print(f"seed {flags.seed}, {flags.minutes:g} minutes, {flags.clients} clients", flush=True)
    raise SystemExit(uvloop.run(run(flags.minutes, flags.seed, flags.clients)))


if __name__ == "__main__":
    main()
