"""An engine without a model: says the prompt's words back, with knobs for delay, failure and death (`echo_script`).

For tests and benchmarks of everything around a model. It runs on the service's own event loop and does nothing per
sequence but arithmetic, so that a flood of one-token jobs measures the bus. One timer serves all sequences.
"""

import asyncio
import heapq
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import msgspec

from gpu_worker.echo_script import (
    CONTEXT_LENGTH,
    BadPrompt,
    EchoKnobs,
    EchoScript,
    position_after,
    text_of,
    tokens_of,
    write_script,
)
from gpu_worker.engine import End, EngineInfo, EngineLoad, GenerateRequest, Piece, SequenceId

RESUME_DIGEST = "echo-1"  # any echo engine continues the token ids of any other
PREFILL_RATE = 1e6  # tokens/s: it reads a prompt as fast as Python splits words
NO_LOGPROBS = End(
    "error",
    error_code="unsupported",
    error_message="the echo engine has no log probabilities",
    unable=True,
    lacks="logprobs",
)
RATE_WINDOW_S = 0.25
RATE_WEIGHT = 0.3


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Running:
    __slots__ = ("cancelled", "position", "request", "script", "text_len")

    def __init__(self, request: GenerateRequest, script: EchoScript) -> None:
        self.request = request
        self.script = script
        self.position = position_after(script, len(request.forced_text), len(request.forced_tokens))
        self.text_len = len(request.forced_text)
        self.cancelled = False


class EchoEngine:
    """See `gpu_worker.engine.Engine`. `die` and `clock` are arguments: tests survive poison and need no sleep."""

    def __init__(
        self,
        *,
        models: Sequence[str] = ("echo",),
        capacity: int = 8,
        knobs: EchoKnobs | None = None,
        context_length: int = CONTEXT_LENGTH,
        die: Callable[[], None] = kill_this_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = tuple(models)
        self._capacity = capacity
        self._knobs = knobs or EchoKnobs()
        self._context_length = context_length
        self._die = die
        self._clock = clock
        self._waiting: deque[_Running] = deque()
        self._running: dict[SequenceId, _Running] = {}
        self._due: list[tuple[float, int, _Running]] = []  # heap: when the next token of a sequence is to be said
        self._order = 0  # breaks ties in the heap
        self._refused: list[Piece] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._stalled = False
        self._progress_s = clock()
        self._window_s, self._window_tokens = clock(), 0
        self._rate = 1000 / max(self._knobs.delay_ms, 1) * capacity

    async def start(self) -> EngineInfo:
        return EngineInfo(
            kind="echo",
            models=self._models,
            context_length=self._context_length,
            capacity=self._capacity,
            resume_digest=RESUME_DIGEST,
            can=(),
        )

    def submit(self, request: GenerateRequest) -> None:
        script = write_script(request.job, self._knobs, self._context_length)
        if request.job.logprobs is not None:
            self._refused.append(_piece(request, 0, len(request.forced_text), b"", (), NO_LOGPROBS))
        elif isinstance(script, BadPrompt):
            end = End("error", error_code=script.code, error_message=script.message, fault="client", outgrown=True)
            self._refused.append(_piece(request, 0, len(request.forced_text), b"", (), end))
        else:
            self._waiting.append(_Running(request, script))
        self._wake.set()

    def cancel(self, sequence: SequenceId) -> None:
        running = self._running.get(sequence)
        if running is not None:
            running.cancelled = True
            self._schedule(running, 0.0)
            self._wake.set()
            return
        for waiting in self._waiting:
            if waiting.request.sequence == sequence:
                self._waiting.remove(waiting)
                end = self._end(waiting.script, waiting.position, "cancelled")
                self._refused.append(_piece(waiting.request, waiting.position, waiting.text_len, b"", (), end))
                self._wake.set()
                return

    async def batches(self) -> AsyncIterator[Sequence[Piece]]:
        loop = asyncio.get_running_loop()
        while not self._closed:
            self._wake.clear()
            batch = self.step(self._clock())
            if batch:
                yield batch
                await asyncio.sleep(0)  # a flood of instant answers must not starve the loop
                continue
            timer = loop.call_later(max(self._due[0][0] - self._clock(), 0), self._wake.set) if self._due else None
            await self._wake.wait()
            if timer is not None:
                timer.cancel()

    def load(self) -> EngineLoad:
        busy = bool(self._running or self._waiting)
        return EngineLoad(
            prefill_rate=PREFILL_RATE,
            decode_rate=self._rate,
            capacity=self._capacity,
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._capacity - len(self._running),
            total_blocks=self._capacity,
            idle=not busy,
            last_progress_s=self._progress_s,
        )

    async def close(self) -> None:
        self._closed = True
        self._wake.set()

    def step(self, now_s: float) -> list[Piece]:
        """Everything that is due by now, at most one piece a sequence."""
        if self._stalled:
            return []
        batch, self._refused = self._refused, []
        while self._waiting and len(self._running) < self._capacity:
            running = self._waiting.popleft()
            self._running[running.request.sequence] = running
            pause_s = running.script.first_s + running.script.delay_s
            if pause_s and not running.cancelled:
                self._schedule(running, now_s + pause_s)
            else:
                self._say(batch, running, now_s)
        while self._due and self._due[0][0] <= now_s and not self._stalled:
            due_s, _, running = heapq.heappop(self._due)
            if self._running.get(running.request.sequence) is running:
                self._say(batch, running, now_s, due_s)
        if batch:
            self._progress_s = now_s
            self._measure(batch, now_s)
        return batch

    def _schedule(self, running: _Running, due_s: float) -> None:
        heapq.heappush(self._due, (due_s, self._order, running))
        self._order += 1

    def _say(self, batch: list[Piece], running: _Running, now_s: float, due_s: float = 0.0) -> None:
        """Say what is due of one sequence: all of it without a delay, else one token and those it is late with."""
        script, start = running.script, running.position
        late = int((now_s - due_s) / script.delay_s) if script.delay_s and due_s else 0
        end_at = script.tokens if not script.delay_s else min(start + 1 + late, script.tokens)
        end_at = min([end_at, *(at for at in (script.poison_at, script.stall_at) if at is not None and at > start)])
        end: End | None = None
        if running.cancelled:
            end_at, end = start, self._end(script, start, "cancelled")
        elif script.poison_at is not None and end_at > script.poison_at:
            self._die()
        elif script.stall_at is not None and end_at > script.stall_at:
            self._stalled = True
            return
        elif script.fail_at is not None and end_at > script.fail_at:
            end_at = max(script.fail_at, start)
            end = self._failure(script, end_at)
        elif end_at >= script.tokens:
            end_at = max(end_at, start)
            end = msgspec.structs.replace(self._end(script, end_at, script.reason), outgrown=script.outgrown)
        text = text_of(script.words, start, end_at) if end_at > start else b""
        tokens = tokens_of(script.words, start, end_at)
        batch.append(_piece(running.request, start, running.text_len, text, tokens, end))
        running.position, running.text_len = end_at, running.text_len + len(text)
        if end is not None:
            del self._running[running.request.sequence]
        else:
            self._schedule(running, now_s + script.delay_s)

    def _end(self, script: EchoScript, tokens: int, reason: Literal["stop", "length", "cancelled"]) -> End:
        return End(reason, prompt_tokens=script.prompt_tokens, new_tokens=tokens)

    def _failure(self, script: EchoScript, tokens: int) -> End:
        code = "bad_request" if script.fault == "client" else "node_error"
        return End(
            "error",
            prompt_tokens=script.prompt_tokens,
            new_tokens=tokens,
            error_code=code,
            error_message="the prompt asked for this failure",
            fault=script.fault,
        )

    def _measure(self, batch: list[Piece], now_s: float) -> None:
        """EWMA of tokens a second over windows in which something was said."""
        self._window_tokens += sum(len(piece.tokens) for piece in batch)
        passed_s = now_s - self._window_s
        if passed_s < RATE_WINDOW_S:
            return
        if passed_s < 4 * RATE_WINDOW_S:  # a longer window was mostly idle and says nothing about the speed
            self._rate += RATE_WEIGHT * (self._window_tokens / passed_s - self._rate)
        self._window_s, self._window_tokens = now_s, 0


def _piece(
    request: GenerateRequest, token_at: int, text_at: int, text: bytes, tokens: tuple[int, ...], end: End | None
) -> Piece:
    return Piece(request.sequence, text_at, text, token_at, tokens, end)
