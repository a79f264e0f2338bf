"""What all drivers share: bursts come in as lines of JSON, the times of their tokens go out as lines of JSON.

    parent -> driver   {"do": "burst", "prompts": [[token, ...], ...], "new": 128}
    driver -> parent   {"version": "...", "storage": "...", ...}      once, when it can answer
                       {"arrivals": [[[s, tokens], ...], ...]}        for each prompt: seconds since the burst, tokens

A peer's driver runs in the peer's own venv and imports nothing of this project: the standard library and the peer.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True, help="the largest burst that will come")
    parser.add_argument("--context", type=int, required=True, help="tokens of a prompt and its answer, at most")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mode", default="")
    return parser.parse_args()


def claim_stdout() -> TextIO:
    """Our pipe to the parent. Whatever else prints, C++ included, goes to stderr from now on."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return pipe


def serve(pipe: TextIO, ready: dict[str, Any], **actions: Callable[..., dict[str, Any]]) -> None:
    """Answer until the parent closes our standard input. Each action is called with the fields of its line."""
    print(json.dumps(ready), file=pipe)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(actions[asked.pop("do")](**asked)), file=pipe)


def in_threads(prompts: list[list[int]], answer: Callable[[list[int], Callable[[int], None]], None]) -> dict[str, Any]:
    """One thread a prompt, all let go together. `answer(prompt, came)` calls `came(tokens)` whenever tokens arrive."""
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]
    began_s = time.perf_counter()

    def one(prompt: list[int], heard: list[tuple[float, int]]) -> None:
        answer(prompt, lambda tokens: heard.append((time.perf_counter() - began_s, tokens)))

    threads = [threading.Thread(target=one, args=pair) for pair in zip(prompts, arrivals, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"arrivals": arrivals}
