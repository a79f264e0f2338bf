"""What a worker still has to tell the server, and when: pure, no clock and no connection of its own.

Per held job, offsets into the whole answer (UTF-8 bytes, and tokens beside them):

    0 ......... stored ......... sent ......... len(text)
      answered          in calls        unsent
                        unanswered

A flush moves `sent`, its answer moves `stored`. A gap (the server has less than we sent from) moves `sent` back to
what the server has; a lost reply moves it back to `stored`, because repeats are dropped there and holes are not
possible. Answers of calls issued before such a rewind say nothing new and are passed over. One take = at most one
flush for all sequences and one finish for all that ended; the finish carries the last text, so a short job costs its
share of one call. At most UNANSWERED_MAX calls are out; beyond that pieces coalesce in the jobs. Log probabilities of
a job that asks for them (`answer_log`) move with its tokens: a record is never stored without its token, nor a token
without its record.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from bus.codec.wire import Finished, FinishReply, FlushReply, Gap, Moved, Route, Stop, Stored
from bus.ids import Fence, JobId
from gpu_worker.answer_log import AnswerLog
from gpu_worker.engine import End, Piece, SequenceId

UNANSWERED_MAX = 8
JOBS_PER_CALL = 64  # keeps one script call around a millisecond
SLICE_BYTES_MAX = 256 * 1024
KEPT_MAX = 20_000  # finishes remembered for a server that lost its last second
KEPT_BYTES_MAX = 64 * 1024 * 1024
HELD_BYTES = 1024  # of a job's own fields, roughly
PAUSE_S = 0.2  # after a refusal by the link or the server


class EngineFault(Exception):
    """An engine broke its contract; the job is not to blame and runs elsewhere."""


class Held:
    """One job that this node runs, from its entry until its finish is answered. Mutable; owned by one Publisher."""

    __slots__ = (
        "asked_s",
        "bytes_kept",
        "deadline_ms",
        "end",
        "entry_id",
        "fence",
        "first_s",
        "job_id",
        "keeps_tokens",
        "log",
        "outgrown",
        "overdue",
        "rewound_at",
        "route",
        "sent_text",
        "sent_tokens",
        "sequence",
        "start_tokens",
        "stored_text",
        "stored_tokens",
        "text",
        "tokens",
    )

    def __init__(
        self,
        job_id: JobId,
        fence: Fence,
        *,
        route: Route,
        entry_id: str = "",
        deadline_ms: int = 0,
        asked_s: float = 0.0,
        forced_text: bytes = b"",
        forced_tokens: Iterable[int] = (),
        keeps_tokens: bool = True,
        log: AnswerLog | None = None,
    ) -> None:
        self.job_id = job_id
        self.fence = fence
        self.sequence: SequenceId = f"{job_id}/{fence}"
        self.route = route
        self.keeps_tokens = keeps_tokens  # False: the server holds no ids of this attempt, only text
        self.entry_id = entry_id  # of the node's stream
        self.deadline_ms = deadline_ms
        self.asked_s = asked_s  # monotonic, when its entry was read
        self.first_s = 0.0  # when its first piece came; 0 = not yet
        self.text = bytearray(forced_text)
        self.tokens = array("I", forced_tokens)
        self.start_tokens = len(self.tokens)
        self.stored_text = self.sent_text = len(self.text)
        self.stored_tokens = self.sent_tokens = len(self.tokens)
        self.log = log  # None: the job does not ask for log probabilities
        self.end: End | None = None
        self.outgrown: End | None = None  # how it ends if no other node has a larger context
        self.rewound_at = 0  # number of the last call issued before the latest rewind
        self.bytes_kept = 0
        self.overdue = False  # cancelled here because its deadline passed

    def append(self, piece: Piece) -> None:
        """Raises EngineFault when the piece does not continue the text, or comes after the end."""
        ended = self.end is not None or self.outgrown is not None
        if piece.text_offset != len(self.text) or ended:
            raise EngineFault(f"piece at byte {piece.text_offset} of {len(self.text)}, ended: {ended}")
        self.text += piece.text
        if self.keeps_tokens:
            self.tokens.extend(piece.tokens)
        if self.log is not None:
            self.log.append(piece.logprobs)
        if piece.end is not None and piece.end.outgrown:
            self.outgrown = piece.end
        else:
            self.end = piece.end

    @property
    def is_stored(self) -> bool:
        """Whether the server has all that there is."""
        at_end = self.stored_text == len(self.text) and self.stored_tokens == len(self.tokens)
        return at_end and (self.log is None or self.log.stored == self.log.size)

    def rewind(self, text_len: int, token_len: int, logprobs_len: int | None, issued: int) -> None:
        """logprobs_len: None = as far as is known to be stored."""
        self.sent_text = self.stored_text = min(text_len, len(self.text))
        self.sent_tokens = self.stored_tokens = min(token_len, len(self.tokens))
        if self.log is not None:
            self.log.rewind(logprobs_len)
        self.rewound_at = issued


class Slice(msgspec.Struct, frozen=True):
    """A part of a job's answer in one call."""

    held: Held
    text_from: int
    text_to: int
    token_from: int
    token_to: int
    log_from: int = 0
    log_to: int = 0

    @property
    def is_empty(self) -> bool:
        return self.text_to == self.text_from and self.token_to == self.token_from and self.log_to == self.log_from

    @property
    def is_last(self) -> bool:
        """Whether it reaches the end of what there is."""
        held = self.held
        at_end = self.text_to == len(held.text) and self.token_to == len(held.tokens)
        return at_end and (held.log is None or self.log_to == held.log.size)

    @property
    def logprobs(self) -> bytes | None:
        return None if self.held.log is None else self.held.log.cut(self.log_from, self.log_to)

    @property
    def text(self) -> bytes:
        return bytes(self.held.text[self.text_from : self.text_to])

    @property
    def tokens(self) -> bytes:
        """Four bytes each, little endian (`bus.codec.wire.pack_tokens`)."""
        part = self.held.tokens[self.token_from : self.token_to]
        if sys.byteorder == "big":
            part.byteswap()
        return part.tobytes()


class Call(msgspec.Struct, frozen=True):
    """One script call to make, for many jobs."""

    number: int  # 1, 2, 3 ... in the order of issue
    is_finish: bool
    slices: tuple[Slice, ...]


Answer = FlushReply | FinishReply


class Publisher:
    """The held jobs of one node, what is unsent of each, and the finishes kept for a server that forgets."""

    def __init__(self, *, flush_s: float, keep_s: float, unanswered_max: int = UNANSWERED_MAX) -> None:
        self._flush_s = flush_s
        self._keep_s = keep_s
        self._unanswered_max = unanswered_max
        self._held: dict[SequenceId, Held] = {}
        self._dirty: dict[SequenceId, Held] = {}
        self._kept: dict[SequenceId, tuple[float, Held]] = {}  # oldest first, with the time to forget it
        self._kept_bytes = 0
        self._outgrown: dict[SequenceId, Held] = {}  # to be offered once all of it is stored
        self._urgent = False
        self._next_s = 0.0  # no flush before this, unless urgent
        self._paused_s = 0.0  # nothing at all before this
        self._issued = 0
        self._unanswered = 0

    # the held jobs

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def get(self, sequence: SequenceId) -> Held | None:
        return self._held.get(sequence)

    def listed(self) -> list[tuple[JobId, Fence]]:
        """What `renew` lists: every job until its finish is answered. Safe from another thread (one atomic copy)."""
        return [(held.job_id, held.fence) for held in list(self._held.values())]

    @property
    def running(self) -> int:
        """Jobs that the engine still works on."""
        return sum(1 for held in self._held.values() if held.end is None and held.outgrown is None)

    @property
    def unanswered(self) -> int:
        return self._unanswered

    @property
    def kept(self) -> int:
        return len(self._kept)

    def hold(self, held: Held) -> None:
        self._held[held.sequence] = held

    def drop(self, sequence: SequenceId) -> Held | None:
        """Forget a job that is not ours any more, or was handed back."""
        self._dirty.pop(sequence, None)
        self._outgrown.pop(sequence, None)
        return self._held.pop(sequence, None)

    def drop_all(self) -> list[Held]:
        dropped = list(self._held.values())
        self._held.clear()
        self._dirty.clear()
        self._outgrown.clear()
        self._kept.clear()
        self._kept_bytes = 0
        return dropped

    # what the engine said

    def add(self, piece: Piece, now_s: float) -> Held | None:
        """Take a piece in; None if nobody holds its job any more. Raises EngineFault."""
        held = self._held.get(piece.sequence)
        if held is None:
            return None
        held.append(piece)
        if not held.first_s and (piece.text or piece.tokens):
            held.first_s = now_s
            self._urgent = True  # the first token goes at once
        if piece.end is not None:
            self._urgent = True
        if held.outgrown is not None:
            self._outgrown[held.sequence] = held
        self._dirty[held.sequence] = held
        return held

    def end(self, held: Held, end: End) -> None:
        """End a job that the engine did not end."""
        held.end = end
        self._urgent = True
        self._dirty[held.sequence] = held
        self._outgrown.pop(held.sequence, None)

    def take_outgrown(self) -> list[Held]:
        """Jobs that outgrew this node and are stored as far as they go, each told once."""
        stored = [held for held in self._outgrown.values() if held.is_stored]
        for held in stored:
            del self._outgrown[held.sequence]
        return stored

    def end_outgrown(self, held: Held) -> None:
        """No other node has a larger context: it ends here."""
        end = held.outgrown
        assert end is not None
        held.text += end.tail
        self.end(held, msgspec.structs.replace(end, outgrown=False, tail=b""))

    # what goes out

    def due_s(self) -> float | None:
        """When the next `take` may give something; None: only a new piece or an answer can change that."""
        if not self._dirty or self._unanswered >= self._unanswered_max:
            return None
        return max(self._paused_s, 0.0 if self._urgent else self._next_s)

    def take(self, now_s: float) -> list[Call]:
        """The calls to issue now: none, a flush, a finish, or both. Each must be answered or failed later."""
        due_s = self.due_s()
        if due_s is None or now_s < due_s:
            return []
        flushes: list[Slice] = []
        finishes: list[Slice] = []
        for sequence, held in list(self._dirty.items()):
            if len(flushes) >= JOBS_PER_CALL or len(finishes) >= JOBS_PER_CALL:
                break
            part = next_slice(held)
            if held.end is not None and part.is_last:
                finishes.append(part)
            elif not part.is_empty:
                flushes.append(part)
            held.sent_text, held.sent_tokens = part.text_to, part.token_to
            if held.log is not None:
                held.log.sent = part.log_to
            if part.is_last:
                del self._dirty[sequence]
        self._urgent = bool(self._dirty)  # what did not fit goes with the next call, not with the next tick
        self._next_s = now_s + self._flush_s
        return [self._issue(parts, is_finish) for parts, is_finish in ((flushes, False), (finishes, True)) if parts]

    def _issue(self, parts: list[Slice], is_finish: bool) -> Call:
        self._issued += 1
        self._unanswered += 1
        return Call(self._issued, is_finish, tuple(parts))

    # what came back

    def answered(self, call: Call, answers: Sequence[Answer], now_s: float) -> tuple[list[Held], list[Held]]:
        """Fold the answers in, in the order of the slices. Returns (finished, stopped); both are held no longer."""
        self._unanswered -= 1
        finished: list[Held] = []
        stopped: list[Held] = []
        for part, answer in zip(call.slices, answers, strict=True):
            held = part.held
            if self._held.get(held.sequence) is not held and not held.bytes_kept:
                continue  # dropped meanwhile
            match answer:
                case Stored():
                    held.stored_text = max(held.stored_text, part.text_to)
                    held.stored_tokens = max(held.stored_tokens, part.token_to)
                    if held.log is not None:
                        held.log.stored = max(held.log.stored, part.log_to)
                case Finished():
                    held.stored_text, held.stored_tokens = part.text_to, part.token_to
                    if held.log is not None:
                        held.log.stored = part.log_to
                    if held.sequence in self._held:
                        finished.append(held)
                    self._finished(held, now_s)
                case Stop():
                    self._forget(held)
                    stopped.append(held)
                case Gap():
                    if answer.text_len > len(held.text) or (held.log and answer.logprobs_len not in held.log):
                        self._forget(held)  # somebody else wrote under our fence: cannot be, and must not be made worse
                        stopped.append(held)
                    else:
                        self._rewind(held, call.number, answer)
                case Moved(route=route):
                    held.route = route
                    self._rewind(held, call.number)
        return finished, stopped

    def failed(self, call: Call, now_s: float, *, pause: bool = False) -> None:
        """The outcome is unknown: everything from what is known to be stored goes again."""
        self._unanswered -= 1
        if pause:
            self._paused_s = now_s + PAUSE_S
        for part in call.slices:
            if self._held.get(part.held.sequence) is part.held or part.held.bytes_kept:
                self._rewind(part.held, call.number)

    def repeat_kept(self) -> int:
        """Send all kept finishes again: the server is another one, or lost its last second."""
        for _, held in self._kept.values():
            self._rewind(held, self._issued)
        return len(self._kept)

    def repeat_finish(self, sequence: SequenceId) -> bool:
        """Send one kept finish again, when told that its job still runs. False: it is not kept."""
        kept = self._kept.get(sequence)
        if kept is None:
            return False
        self._rewind(kept[1], self._issued)
        return True

    def expire(self, now_s: float) -> None:
        """Forget finishes that are old enough."""
        while self._kept:
            sequence, (until_s, held) = next(iter(self._kept.items()))
            if until_s > now_s:
                return
            if sequence in self._dirty:  # being repeated: its answer decides
                self._keep(held, now_s)
            else:
                self._forget(held)

    def _rewind(self, held: Held, number: int, gap: Gap | None = None) -> None:
        """To what the server says it has, else to what is known to be stored."""
        if number <= held.rewound_at and not held.bytes_kept:
            return
        if gap is None:
            held.rewind(held.stored_text, held.stored_tokens, None, self._issued)
        else:
            held.rewind(gap.text_len, gap.token_len, gap.logprobs_len, self._issued)
        self._dirty[held.sequence] = held
        self._urgent = True

    def _finished(self, held: Held, now_s: float) -> None:
        self._held.pop(held.sequence, None)
        if held.sequence not in self._kept:
            self._keep(held, now_s)
        while len(self._kept) > KEPT_MAX or self._kept_bytes > KEPT_BYTES_MAX:
            self._forget(next(iter(self._kept.values()))[1])

    def _keep(self, held: Held, now_s: float) -> None:
        """As the youngest."""
        self._forget_kept(held)
        held.bytes_kept = len(held.text) + 4 * len(held.tokens) + (held.log.kept if held.log else 0) + HELD_BYTES
        self._kept_bytes += held.bytes_kept
        self._kept[held.sequence] = (now_s + self._keep_s, held)

    def _forget_kept(self, held: Held) -> None:
        if self._kept.pop(held.sequence, None) is not None:
            self._kept_bytes -= held.bytes_kept
            held.bytes_kept = 0

    def _forget(self, held: Held) -> None:
        self.drop(held.sequence)
        self._forget_kept(held)


def next_slice(held: Held) -> Slice:
    """From what was sent last, up to SLICE_BYTES_MAX, never inside a character. Tokens go ahead of their text."""
    text_to, token_to, log = min(len(held.text), held.sent_text + SLICE_BYTES_MAX), len(held.tokens), held.log
    if log is None:
        return Slice(held, held.sent_text, _whole(held, text_to), held.sent_tokens, token_to)
    part = log.next_part(SLICE_BYTES_MAX)
    if part.text_at is not None:  # neither tokens nor text may be ahead of their records
        text_to = max(held.sent_text, min(text_to, part.text_at))
        if held.keeps_tokens:
            token_to = held.start_tokens + part.records
    return Slice(held, held.sent_text, _whole(held, text_to), held.sent_tokens, token_to, log.sent, part.end)


def _whole(held: Held, text_to: int) -> int:
    """Back to where a character begins."""
    while text_to < len(held.text) and held.text[text_to] & 0xC0 == 0x80:
        text_to -= 1
    return text_to
