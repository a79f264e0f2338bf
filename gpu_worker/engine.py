"""The seam between the worker's service and whatever turns a prompt into text.

An engine runs in its own thread, process or on remote machines; it never touches Redis. The service submits
sequences, iterates `batches()` and publishes them. Every submitted sequence ends with exactly one `End`.

Offsets: `text_offset` counts UTF-8 bytes of the answer, `token_offset` counts its tokens; both start at 0 for the
whole answer, forced prefix included, so the first piece of a resumed sequence starts at the prefix' lengths. Log
probabilities come for each token that a piece carries, never for those of the forced prefix.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

from bus.jobs import Capability, ChatJob

SequenceId = str  # "<job id>/<fence>"


class GenerateRequest(msgspec.Struct, frozen=True):
    sequence: SequenceId
    job: ChatJob
    seed: int  # with the sampler's position (= tokens already produced) fixes every draw
    forced_tokens: tuple[int, ...] = ()  # produced by an earlier attempt on an engine of the same resume digest
    forced_text: bytes = b""  # always the text shown so far; without forced_tokens it is tokenised again
    deadline_ms: int = 0  # wall clock of the server; 0 = none. The service cancels; engines may use it to order work


class End(msgspec.Struct, frozen=True):
    """Why a sequence is over. `error` ends carry a code, whose fault it is, and a sentence for the client."""

    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int = 0
    new_tokens: int = 0  # tokens of the whole answer, forced prefix included
    error_code: str = ""  # context_length_exceeded | bad_request | node_error | interrupted ...
    error_message: str = ""
    fault: Literal["", "client", "node"] = ""  # client: job fails at once; node: requeued elsewhere as node_error
    unable: bool = False  # of an error: this engine cannot do what the job asks for, another one may
    lacks: Capability | None = None  # and it can do this for no job, for now
    outgrown: bool = False  # only this engine's context was too small: a prompt refused, or `length` before max_tokens
    tail: bytes = b""  # of an outgrown answer: text that is let out only if it ends here


class Piece(msgspec.Struct, frozen=True):
    sequence: SequenceId
    text_offset: int
    text: bytes  # whole UTF-8 characters only; stop strings already held back
    token_offset: int
    tokens: tuple[int, ...]  # empty for engines without token ids (relay)
    end: End | None = None
    logprobs: bytes = b""  # whole records (bus.codec.logprobs) of these tokens, if the job asks for them


class EngineLoad(msgspec.Struct, frozen=True):
    """Honest figures for the dispatcher. Rates are measured (EWMA), tokens per second."""

    prefill_rate: float
    decode_rate: float  # of the whole engine at its present batch
    capacity: int  # sequences it can hold at once, by free blocks
    running: int
    waiting: int
    free_blocks: int = 0
    total_blocks: int = 0
    drafted: int = 0  # tokens guessed by speculation since the start ...
    accepted: int = 0  # ... and those of them that the model agreed with
    idle: bool = True
    last_progress_s: float = 0.0  # monotonic time of the last step that produced anything; the lease follows it


class EngineInfo(msgspec.Struct, frozen=True):
    """Known once the engine is ready; goes into the node's registration."""

    kind: Literal["torch", "echo", "http"]
    models: tuple[str, ...]
    context_length: int
    capacity: int
    resume_digest: str = ""  # "" = none; equal digests may exchange token ids
    layers: tuple[int, ...] = ()
    can: tuple[Capability, ...] | None = None  # None: it does not say, and is asked for everything


class Engine(Protocol):
    async def start(self) -> EngineInfo:
        """Load whatever is needed. Raises EngineStartError with a sentence that says what to do."""
        ...

    def submit(self, request: GenerateRequest) -> None:
        """Never blocks and never raises for a bad request: that arrives as an `End` with fault="client"."""
        ...

    def cancel(self, sequence: SequenceId) -> None:
        """Ends the sequence with reason "cancelled" within one step; unknown ids are ignored."""
        ...

    def batches(self) -> AsyncIterator[Sequence[Piece]]:
        """What all sequences produced since the last batch, at most one Piece a sequence. Ends after close()."""
        ...

    def load(self) -> EngineLoad: ...

    async def close(self) -> None: ...


class EngineStartError(Exception):
    """The engine cannot start; the message is one line that says what to do."""
