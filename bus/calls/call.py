"""One job that this process waits for, and what is due for it: facts in `Call`, decisions in pure functions.

There is one Call per job id, however many wait for it. `where` says where its news comes:

                  submit, attach              takes it over (another gateway)
    asking ----------------------------> here ----------------------------> elsewhere
      |  the job was there before                     attach: back again       |
      +----------------------------------> elsewhere ------------------------> here
      +-- attach to a plain producer's --> stored

- asking: its submit or attach has no answer yet; nothing is asked about it meanwhile.
- here: markers, frames and the end come on our out-stream; silence is checked.
- elsewhere: on another gateway's; we wait for the whole, so its end is found by asking now and then.
- stored: a plain producer's `reply:` stream, which stays his; end and text are found by asking, more often.
"""

import asyncio
from typing import Literal, Protocol

from bus.calls.following import Ended, Following
from bus.codec.entries import End
from bus.codec.wire import JobRecord, Policy, Route, Submission
from bus.ids import GatewayId, JobId

Where = Literal["asking", "here", "elsewhere", "stored"]
Step = Literal["nothing", "check", "cancel", "forget", "end"]
AfterLoss = Literal["redrive", "wait", "give up"]
Errand = Literal["check", "fill", "cancel"]

ELSEWHERE_CHECK_S = 1.0
STORED_CHECK_S = 0.2  # so at every look
MISSING_CHECK_S = 1.0


class Waiter(Protocol):
    """A handle, as the job sees it."""

    def wake(self) -> None: ...


class Call:
    """A job in the table: shared by its handles, fed by the readers of `Caller`."""

    __slots__ = (
        "asking",
        "cancelled_by",
        "closing_at",
        "deadline_at",
        "deadline_ms",
        "errands",
        "following",
        "handles",
        "heard_at",
        "job_id",
        "missing_at",
        "node",
        "policy",
        "submission",
        "taken_by",
        "tried_at",
        "where",
    )

    def __init__(
        self, job_id: JobId, following: Following, submission: Submission | None, now: float, deadline_at: float
    ) -> None:
        self.job_id = job_id
        self.following = following
        self.submission = submission  # None: attached, we never held the request
        self.handles: list[Waiter] = []
        self.where: Where = "asking"
        self.asking: asyncio.Future[None] | None = None  # done when `where` is known; others wait for it too
        self.taken_by = ""  # the gateway that took the stream from us: those who stream hear `Detached`
        self.heard_at = now  # loop time of the last entry or state check
        self.missing_at: float | None = None  # loop time of the first state check that found no such job
        self.deadline_at = deadline_at  # loop time after which we end it ourselves: the server did not
        self.deadline_ms = 0  # of the job, by the server's clock
        self.errands: set[Errand] = set()  # on their way to the server for this job: one of a kind at a time
        self.node = ""
        # What becomes of the job when its last handle is gone. We only attached to it? Then its record says.
        self.policy: Policy = submission.policy if submission is not None else "keep"
        self.closing_at: float | None = None  # loop time since which nobody waits
        self.cancelled_by = ""  # an explicit cancel that has not reached the server yet
        self.tried_at = float("-inf")  # loop time of the last attempt to cancel

    def move_to(self, where: Where, by: str = "") -> None:
        """News of the job comes from there from now on; `by` took the stream from us, if we had it."""
        if where == "here":
            self.taken_by = ""
        elif self.where == "here":
            self.taken_by = by
        self.where = where

    def wake(self) -> None:
        for handle in self.handles:
            handle.wake()


def next_step(call: Call, now: float, *, silence_s: float, grace_s: float) -> Step:
    """What is due for this job at loop time `now`."""
    if now >= call.deadline_at:
        return "end"
    if call.cancelled_by:
        return "cancel" if now - call.tried_at >= grace_s else "nothing"
    if call.closing_at is not None and now - call.closing_at >= grace_s:
        if call.policy == "keep" or call.where in ("elsewhere", "stored"):
            return "forget"
        return "cancel" if now - call.tried_at >= grace_s else "nothing"
    return "check" if now - call.heard_at >= patience_s(call, silence_s) else "nothing"


def patience_s(call: Call, silence_s: float) -> float:
    """How long the job may be silent before it is asked for."""
    if call.missing_at is not None:
        return min(silence_s, MISSING_CHECK_S)
    match call.where:
        case "asking":
            return float("inf")
        case "here":
            return silence_s
        case "elsewhere":
            return ELSEWHERE_CHECK_S
        case "stored":
            return STORED_CHECK_S


def where_of(route: Route, gateway: GatewayId) -> Where:
    """Where news of a living job comes for the process `gateway`, by the job's route."""
    if route.out.startswith("reply:"):
        return "stored"
    return "here" if route.gateway == gateway else "elsewhere"


def must_attach(call: Call) -> bool:
    """Whether a caller who streams has to bring the stream here first."""
    following = call.following
    if following.ended is not None or following.waiting_for_text() is not None or call.where == "stored":
        return False
    return call.where != "here" or not following.streamed


def after_loss(call: Call, now: float, *, wait_s: float) -> AfterLoss:
    """What to do about a job that the server does not know (any more).

    Whoever has the stream and the request drives it again at once. All others first give him time: he may notice later.
    """
    if call.where == "here" and call.submission is not None:
        return "redrive"
    if call.missing_at is None or now - call.missing_at < wait_s:
        return "wait"
    return "redrive" if call.submission is not None else "give up"


def to_ended(terminal: End | JobRecord) -> Ended:
    """How a job ended, as its out-stream or its stored record says."""
    failed = terminal.reason == "error" and terminal.error_code
    return Ended(
        state=terminal.state,
        reason=terminal.error_code if failed else terminal.reason,
        prompt_tokens=terminal.prompt_tokens,
        new_tokens=terminal.new_tokens,
        node=terminal.node,
        error_code=terminal.error_code,
        error_message=terminal.error_message,
        retry_after_ms=terminal.retry_after_ms if isinstance(terminal, End) else 0,
        attempts=int(terminal.fence.partition(".")[0] or 0),
    )
