"""A closed loop: N callers, each with one job in flight, each waiting for its result before the next.

Only the standard library, because every contender's client imports this in a venv of its own. A client reads one JSON
request per line on stdin ({"in_flight": 32, "seconds": 5}) and answers with one JSON line of figures, so that start-up
and imports are outside the measurement and the server's counters can be read in between.
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable


def percentile(latencies_s: list[float], share: float) -> float:
    """Nearest rank, in milliseconds. latencies_s: sorted."""
    return 1000 * latencies_s[min(len(latencies_s) - 1, int(share * len(latencies_s)))]


def to_figures(latencies_s: list[float], wall_s: float, cpu_s: float, failed: int) -> dict[str, float]:
    ordered = sorted(latencies_s) or [float("nan")]
    jobs = len(latencies_s)
    return {
        "jobs": jobs,
        "failed": failed,
        "jobs_per_s": jobs / wall_s,
        "p50_ms": percentile(ordered, 0.50),
        "p99_ms": percentile(ordered, 0.99),
        "max_ms": 1000 * ordered[-1],
        "client_cpu_us": 1e6 * cpu_s / max(jobs, 1),
    }


async def measure(call: Callable[[int], Awaitable[object]], in_flight: int, seconds: float) -> dict[str, float]:
    """call(i) does one job and returns once its result is there."""
    latencies: list[float] = []
    failed = 0
    clock = time.perf_counter
    end = clock() + seconds

    async def caller(number: int) -> None:
        nonlocal failed
        while (start := clock()) < end:
            try:
                await call(number)
            except Exception as error:  # noqa: BLE001  # any failure is a figure, not the end of the run
                failed += 1
                print(f"failed: {error!r}", file=sys.stderr)
                await asyncio.sleep(0.01)
            else:
                latencies.append(clock() - start)

    start, cpu = clock(), time.process_time()
    await asyncio.gather(*(caller(number) for number in range(in_flight)))
    return to_figures(latencies, clock() - start, time.process_time() - cpu, failed)


def measure_in_threads(call: Callable[[int], object], in_flight: int, seconds: float) -> dict[str, float]:
    """The same for a client without asyncio: one thread for each job in flight."""
    latencies: list[float] = []
    failures: list[str] = []
    clock = time.perf_counter
    end = clock() + seconds

    def caller(number: int) -> None:
        while (start := clock()) < end:
            try:
                call(number)
            except Exception as error:  # noqa: BLE001
                failures.append(repr(error))
            else:
                latencies.append(clock() - start)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(in_flight)]
    start, cpu = clock(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures[:3]:
        print(f"failed: {failure}", file=sys.stderr)
    return to_figures(latencies, clock() - start, time.process_time() - cpu, len(failures))


async def serve(call: Callable[[int], Awaitable[object]]) -> None:
    """Say ready, then answer requests until stdin closes."""
    print(json.dumps({"ready": True}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        print(json.dumps(await measure(call, request["in_flight"], request["seconds"])), flush=True)


def serve_in_threads(call: Callable[[int], object]) -> None:
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(measure_in_threads(call, request["in_flight"], request["seconds"])), flush=True)
