"""The engine as the worker's service sees it: asyncio on one side, two threads on the other.

    submit() --bounded--> [intake thread] --mailbox--> [step thread] --outbox--> batches()
    cancel() -------------------------------mailbox-------^
                          template, tokenizer          core.step()

Tokenising a long prompt never delays a step, a step never delays the event loop. The outbox holds one merged piece
per sequence; when nobody takes it, the step thread waits, so that it is bounded. Should either thread fail, batches()
raises EngineFailed: never silence.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import torch

from gpu_worker.engine import End, EngineInfo, EngineLoad, GenerateRequest, Piece
from gpu_worker.torch_engine.assembly import Assembled, assemble
from gpu_worker.torch_engine.config import TorchEngineConfig
from gpu_worker.torch_engine.core import EngineCore
from gpu_worker.torch_engine.prompt import Answer, prepare

log = logging.getLogger(__name__)

OPEN_MAX = 4096  # sequences submitted and not ended; bounds the intake, the mailbox and the waiting list
OUTBOX_TOKENS_MAX = 65_536  # produced and not yet taken; beyond it the engine waits for its reader
OUTBOX_TOKEN_BYTES = 64  # of log probabilities count as one more
IDLE_WAIT_S = 1.0
CLOSE_WAIT_S = 10.0

FULL = f"the engine holds {OPEN_MAX} sequences already"

Mail = Callable[[EngineCore], list[Piece]]


class EngineFailed(Exception):
    """A thread of the engine died; the cause is chained. The process should end, its parent starts another."""


class TorchEngine:
    """Implements gpu_worker.engine.Engine."""

    def __init__(
        self,
        config: TorchEngineConfig,
        *,
        assemble: Callable[[TorchEngineConfig], Assembled] = assemble,
        open_max: int = OPEN_MAX,
        outbox_tokens_max: int = OUTBOX_TOKENS_MAX,
    ) -> None:
        self._config = config
        self._assemble = assemble
        self._open_max = open_max
        self._outbox_tokens_max = outbox_tokens_max
        self._assembled: Assembled | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken = asyncio.Event()  # something to take from the outbox, or the end of it
        self._intake: queue.Queue[GenerateRequest | None] = queue.Queue(open_max + 1)
        self._change = threading.Condition()  # guards all below
        self._mailbox: deque[Mail] = deque()
        self._outbox: dict[str, Piece] = {}
        self._outbox_tokens = 0
        self._open: set[str] = set()  # submitted, not ended
        self._arriving: set[str] = set()  # of these: not yet with the core
        self._cancelled: set[str] = set()  # of those: cancelled on the way
        self._moved_s = 0.0  # when work last came to an idle engine, or an answer ended, perhaps without any step
        self._closing = False
        self._failure: BaseException | None = None
        self._load = EngineLoad(prefill_rate=0.0, decode_rate=0.0, capacity=config.capacity, running=0, waiting=0)
        self._threads = [
            threading.Thread(target=self._run, args=(body,), name=f"engine {name}", daemon=True)
            for name, body in (("intake", self._take_in), ("steps", self._steps))
        ]

    async def start(self) -> EngineInfo:
        """Load the model, measure it, start the threads. Raises EngineStartError."""
        self._loop = asyncio.get_running_loop()
        self._assembled = await asyncio.to_thread(self._assemble, self._config)
        self._load = self._assembled.core.load()
        for thread in self._threads:
            thread.start()
        return EngineInfo(
            kind="torch",
            models=(self._config.model_name,),
            context_length=self._assembled.context,
            capacity=self._config.capacity,
            resume_digest=self._assembled.digest,
            layers=tuple(range(self._assembled.layers)),
            can=("logprobs",),
        )

    def submit(self, request: GenerateRequest) -> None:
        with self._change:
            full = len(self._open) >= self._open_max
            if not self._open:
                self._moved_s = time.monotonic()
            if not full:
                self._open.add(request.sequence)
                self._arriving.add(request.sequence)
        if full:
            self._post_end(request, End("error", error_code="node_error", error_message=FULL, fault="node"))
        else:
            self._intake.put_nowait(request)

    def cancel(self, sequence: str) -> None:
        with self._change:
            if sequence in self._arriving:
                self._cancelled.add(sequence)
            else:
                self._mailbox.append(lambda core: core.cancel(sequence))
                self._change.notify_all()

    async def batches(self) -> AsyncIterator[Sequence[Piece]]:
        while True:
            await self._taken.wait()
            self._taken.clear()
            with self._change:
                pieces, self._outbox, self._outbox_tokens = list(self._outbox.values()), {}, 0
                failure, closing = self._failure, self._closing
                self._change.notify_all()
            if pieces:
                yield pieces
            if failure is not None:
                raise EngineFailed(f"the torch engine failed: {failure!r}") from failure
            if closing:
                return

    def load(self) -> EngineLoad:
        """The core's figures after its last step; but whether there is work, and since when, as of now.

        An engine that hangs in the first step after an idle hour must look busy from the submit on, and not stalled
        for an hour.
        """
        with self._change:
            busy, load = bool(self._open), self._load
            last_s = max(load.last_progress_s, self._moved_s)
        return msgspec.structs.replace(load, idle=not busy, last_progress_s=last_s)

    async def close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        with contextlib.suppress(queue.Full):
            self._intake.put_nowait(None)
        self._taken.set()
        deadline_s = time.monotonic() + CLOSE_WAIT_S
        for thread in self._threads:
            if thread.is_alive():
                await asyncio.to_thread(thread.join, max(0.0, deadline_s - time.monotonic()))
                if thread.is_alive():
                    log.warning("engine thread did not end in time", extra={"thread_name": thread.name})

    def _run(self, body: Callable[[Assembled], None]) -> None:
        assert self._assembled is not None
        try:
            body(self._assembled)
        except BaseException as error:
            log.exception("engine thread failed", extra={"thread_name": threading.current_thread().name})
            with self._change:
                self._failure = self._failure or error
                self._closing = True
                self._change.notify_all()
            with contextlib.suppress(queue.Full):
                self._intake.put_nowait(None)
            self._ring()

    def _take_in(self, assembled: Assembled) -> None:
        """Intake thread: a request becomes a sequence, or ends at once."""
        while True:
            request = self._intake.get()
            if request is None or self._closing:
                return
            outcome = prepare(request, assembled.text, context_max=assembled.context)
            if isinstance(outcome, End):
                self._post_end(request, outcome)
            else:
                self._post(request, outcome)

    def _post(self, request: GenerateRequest, answer: Answer) -> None:
        def arrive(core: EngineCore) -> list[Piece]:
            with self._change:
                self._arriving.discard(request.sequence)
                cancelled = request.sequence in self._cancelled
                self._cancelled.discard(request.sequence)
            pieces = core.add(answer)
            return pieces + core.cancel(request.sequence) if cancelled else pieces

        with self._change:
            self._mailbox.append(arrive)
            self._change.notify_all()

    def _post_end(self, request: GenerateRequest, end: End) -> None:
        piece = Piece(request.sequence, len(request.forced_text), b"", len(request.forced_tokens), (), end)

        def arrive(core: EngineCore) -> list[Piece]:
            with self._change:
                self._arriving.discard(request.sequence)
                self._cancelled.discard(request.sequence)
            return [piece]

        with self._change:
            self._mailbox.append(arrive)
            self._change.notify_all()

    def _steps(self, assembled: Assembled) -> None:
        """Step thread: the mailbox, then one step, then the outbox."""
        torch.set_num_threads(assembled.torch_threads)
        core = assembled.core
        while True:
            with self._change:
                while not (
                    self._closing or self._mailbox or (not core.idle and self._outbox_tokens < self._outbox_tokens_max)
                ):
                    self._change.wait(IDLE_WAIT_S)
                if self._closing:
                    return
                mail, self._mailbox = self._mailbox, deque()
            pieces = [piece for letter in mail for piece in letter(core)]
            if self._outbox_tokens < self._outbox_tokens_max:
                pieces += core.step().pieces
            self._publish(pieces, core)

    def _publish(self, pieces: list[Piece], core: EngineCore) -> None:
        with self._change:
            self._load = core.load(arriving=len(self._arriving))
            for piece in pieces:
                before = self._outbox.get(piece.sequence)
                self._outbox[piece.sequence] = piece if before is None else merge(before, piece)
                self._outbox_tokens += len(piece.tokens) + 1 + len(piece.logprobs) // OUTBOX_TOKEN_BYTES
                if piece.end is not None:
                    self._open.discard(piece.sequence)
                    self._moved_s = time.monotonic()
        if pieces:
            self._ring()

    def _ring(self) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._taken.set)


def merge(before: Piece, after: Piece) -> Piece:
    """Two pieces of one sequence that follow each other."""
    assert before.end is None, "a piece after the end"
    assert before.text_offset + len(before.text) == after.text_offset, "text pieces do not meet"
    assert before.token_offset + len(before.tokens) == after.token_offset, "token pieces do not meet"
    return Piece(
        before.sequence,
        before.text_offset,
        before.text + after.text,
        before.token_offset,
        before.tokens + after.tokens,
        after.end,
        before.logprobs + after.logprobs,
    )
