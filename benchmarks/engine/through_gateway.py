"""Driver of the whole fleet: `millrace up` as `make run` starts it, and a streaming client of `/v1/completions`."""

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from tokenizers import Tokenizer

from benchmarks.engine.token_counts import tokens_of_chunks
from benchmarks.peers.driver import claim_stdout, parse_options, serve
from bus.settings import Settings
from tests.operator.fleet import UpProcess, wait_for

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300.0
ANSWER_LIMIT_S = 1800.0


def main() -> None:
    pipe, options = claim_stdout(), parse_options()
    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        fleet = start_fleet(Path(folder) / "fleet", options)
        try:
            client = Client(tokenizer, fleet.ports[0], (fleet.folder / "var" / "api-key").read_text().strip())
            serve(
                pipe,
                {"version": "millrace up, HTTP, server-sent events"},
                burst=lambda prompts, new: asyncio.run(client.burst(prompts, new)),
            )
        finally:
            fleet.close()


def start_fleet(folder: Path, options: Any) -> UpProcess:
    """The Procfile's own roles, on free ports, with the model and the threads that all others get."""
    lines = [line.replace("${PYTHON:-.venv/bin/python}", "$PYTHON") for line in (ROOT / "Procfile").open()]
    settings = {
        "MILLRACE_ENGINE": "torch",
        "MILLRACE_MODEL_PATH": options.model,
        "MILLRACE_DTYPE": options.dtype,
        "MILLRACE_CAPACITY": str(options.requests),
        "MILLRACE_THREADS": str(options.threads),
        "MILLRACE_KV_TOKENS": str(options.requests * options.context),
        "MILLRACE_DRAIN_GRACE_MS": "500",
    }
    literal = (line.rstrip("\n").replace("{", "{{").replace("}", "}}") for line in lines)
    fleet = UpProcess(folder, *literal, settings=settings)
    try:
        wait_for(
            lambda: "Ctrl-C stops" in fleet.output or fleet.process.poll() is not None,
            "the fleet is ready",
            START_LIMIT_S,
        )
        assert fleet.process.poll() is None, fleet.output
    except BaseException:
        fleet.close()
        raise
    return fleet


class Client:
    def __init__(self, tokenizer: Tokenizer, port: int, key: str) -> None:
        self._tokenizer = tokenizer
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._headers = {"Authorization": f"Bearer {key}"}

    async def burst(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        texts = [self._tokenizer.decode(prompt) for prompt in prompts]
        timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector) as session:
            began_s = time.perf_counter()
            streams = [
                self._stream(session, text, len(prompt), new) for text, prompt in zip(texts, prompts, strict=True)
            ]
            streamed = await asyncio.gather(*streams)
        arrivals = []
        for chunks in streamed:
            counts = tokens_of_chunks([text for _, text in chunks], new, self._count)
            arrivals.append([(at_s - began_s, count) for (at_s, _), count in zip(chunks, counts, strict=True)])
        return {"arrivals": arrivals}

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: str, prompt_len: int, new: int
    ) -> list[tuple[float, str]]:
        """(when it came, text) of every chunk."""
        body = {"model": Settings().model, "prompt": prompt, "max_tokens": new, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        chunks, usage = [], None
        async with session.post(self._url, json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                at_s, event = time.perf_counter(), orjson.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["text"]:
                    chunks.append((at_s, event["choices"][0]["text"]))
        assert usage is not None, "the stream ended without usage"
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_len, new), usage
        return chunks

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    main()
