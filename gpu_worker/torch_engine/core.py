"""One step of the engine: plan, launch, collect. No tensor, no asyncio, no thread, no bus.

    depth 0    plan 1, launch 1, collect 1, plan 2, launch 2, collect 2 ...
    depth 1    plan 1, launch 1, plan 2, launch 2, collect 1, plan 3, launch 3, collect 2 ...

Depth 1 is for devices that work while the host does: step n + 1 is planned and launched before the host knows what
step n drew. Who turns out to have ended has one row computed in vain, which is dropped when it is read. Answers that
are being guessed (speculation.py) need their last token on the host, so beside them each step is collected at once.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from gpu_worker.engine import End, EngineLoad, Piece
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.prompt import Answer
from gpu_worker.torch_engine.rates import SETTLED_S, STALL, Rates, capacity_now
from gpu_worker.torch_engine.runner import Flight, Result, Runner
from gpu_worker.torch_engine.sampler import SampledToken
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.sequence import State
from gpu_worker.torch_engine.speculation import Guesser, Worth, agreed
from gpu_worker.torch_engine.step_time import load_of


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A step that was launched and not yet collected."""

    plan: Plan
    flight: Flight
    began_s: float


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the collected steps did: pieces to publish, and how much work it was."""

    pieces: tuple[Piece, ...] = ()
    prefill_tokens: int = 0
    decode_rows: int = 0


class EngineCore:
    """Owns the sequences. Every answer that is added ends with exactly one piece that carries an End."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        speculate: int = 0,
        stall: float = STALL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """speculate: most tokens guessed at once of one answer; 0: none. stall: see `rates.STALL`."""
        self.scheduler = scheduler
        self.rates = Rates(stall)
        self.last_progress_s = clock()
        self.drafted = self.accepted = 0  # tokens guessed, and those of them that were drawn
        self.runner = runner
        self._eos = eos
        self._speculate = speculate
        self.worth = Worth()
        self._clock = clock
        self._answers: dict[str, Answer] = {}
        self._flights: deque[InFlight] = deque()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, answer: Answer) -> list[Piece]:
        """Queue an answer. A forced prefix may already have something to say, or be all there is to say."""
        sequence = answer.sequence
        if answer.ready_end is not None:
            if sequence.outgrows and answer.ready_end.reason == "length":
                # The next engine lets the same text out of the same tokens.
                return [_piece(answer, "", (), _outgrown(answer.ready_end, answer.ready_text))]
            return [_piece(answer, answer.ready_text, (), answer.ready_end)]
        self._answers[sequence.id] = answer
        sequence.arrived_s = self._clock()
        sequence.guesser = Guesser(self._speculate) if self._speculate else None
        self.scheduler.add(sequence)
        return [_piece(answer, answer.ready_text, (), None)] if answer.ready_text else []

    def cancel(self, sequence_id: str) -> list[Piece]:
        """End it now; unknown ids are ignored. What a step in flight draws for it is dropped."""
        answer = self._answers.get(sequence_id)
        return [] if answer is None else [self._finish(answer, "", (), _end(answer, "cancelled"))]

    def step(self) -> StepReport:
        """Launch the next step, then collect those that are not to stay in flight beside it."""
        began_s = self._clock()
        guessing = self.scheduler.guessing and self._guesses_pay()
        plan = self.scheduler.plan(self._prompt_budget(), drafts=guessing)
        if plan.work:
            self._launch(plan, began_s)
        staying = self.runner.depth if plan.work and not guessing else 0
        report = StepReport()
        while len(self._flights) > staying:
            report = _both(report, self._collect(self._flights.popleft()))
        if self.scheduler.idle:
            assert not self._flights, "nothing runs, but a step is in flight"
            self.scheduler.check_integrity()
        return report

    def load(self, *, arriving: int = 0) -> EngineLoad:
        """arriving: requests that are not sequences yet."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        running, waiting = len(scheduler.running), len(scheduler.waiting) + arriving
        typical = self.rates.sequence_tokens
        return EngineLoad(
            prefill_rate=self.rates.prefill_rate,
            decode_rate=self.rates.decode_rate([(len(one.tokens) - 1, 1) for one in scheduler.running]),
            capacity=capacity_now(
                slots=scheduler.capacity,
                running=running,
                waiting=waiting,
                free_tokens=pool.free * pool.block_tokens,
                waiting_tokens=scheduler.waiting_tokens + int(arriving * typical),
                sequence_tokens=typical,
            ),
            running=running,
            waiting=waiting,
            free_blocks=pool.free,
            total_blocks=pool.total,
            idle=self.idle and not arriving,
            last_progress_s=self.last_progress_s,
            drafted=self.drafted,
            accepted=self.accepted,
        )

    def _prompt_budget(self) -> int:
        scheduler = self.scheduler
        settled_s = max(self._clock() - SETTLED_S, scheduler.oldest_prompt_s)
        answers = scheduler.answers()
        settled = sum(0 < one.first_token_s <= settled_s for one in scheduler.running)
        return self.rates.prompt_budget(
            chunk_max=scheduler.chunk_max,
            answers=answers,
            settled=min(settled, len(answers)),
            prompts=scheduler.prompts(),
            arriving=scheduler.arriving,
        )

    def _guesses_pay(self) -> bool:
        """By what a row more costs beside the answers that run; while that is unknown, they are tried."""
        answers, expected_s = self.scheduler.answers(), self.rates.step_time.expected_s
        if not answers or not self.rates.step_time.steps:
            return True
        start, count = answers[0]
        step_s = expected_s(load_of(answers))
        row_s = expected_s(load_of([(start, count + 1), *answers[1:]])) - step_s
        return self.worth.pays(answers=len(answers), step_s=step_s, row_s=row_s)

    def _launch(self, plan: Plan, began_s: float) -> None:
        before = self._flights[-1].flight if self._flights else None
        self._flights.append(InFlight(plan, self.runner.launch(plan, before), began_s))
        self.scheduler.launched(plan)

    def _collect(self, step: InFlight) -> StepReport:
        results, drafted, accepted = self.runner.read(step.flight), self.drafted, self.accepted
        pieces = [piece for result in results if (piece := self._settle(result)) is not None]
        began_s, self.last_progress_s = max(step.began_s, self.last_progress_s), self._clock()
        self.worth.observe(self.drafted - drafted, self.accepted - accepted)
        prefill, decode = step.plan.prefill, step.plan.decode
        self.rates.observe(
            decode=[work.piece for work in decode],
            prefill=[work.piece for work in prefill],
            new_tokens=len(decode) + self.accepted - accepted,
            seconds=self.last_progress_s - began_s,
        )
        return StepReport(tuple(pieces), sum(work.count for work in prefill), len(decode))

    def _settle(self, result: Result) -> Piece | None:
        """One piece of work is done: its tokens go to the answer, as far as they hold and are wanted."""
        work, sequence = result.work, result.work.sequence
        if not result.finite:
            self.runner.clear(self.scheduler.private_blocks(sequence))
        if sequence.state is State.FINISHED:  # it ended while this was on its way
            self.scheduler.collected(work, valid=0)
            return None
        if work.drafts and not result.finite:
            self._start_over(work)
            return None
        answer = self._answers[sequence.id]
        right = agreed(work.drafts, result.tokens)
        text, taken, end = self._take(answer, result.drawn[: right + 1])
        if not result.finite:
            end = _broken(answer)
        self.scheduler.collected(work, valid=work.count - len(work.drafts) + right if result.finite else 0)
        self._judge(work, right)
        if end is not None:
            return self._finish(answer, text, taken, end)
        return _piece(answer, text, taken, None) if taken else None

    def _start_over(self, work: Work) -> None:
        """A draft may be what is not finite, and then nothing of this step tells whose fault it is: again, without."""
        work.sequence.guesser = None
        self.scheduler.collected(work, valid=0)
        self.scheduler.preempt(work.sequence)

    def _take(self, answer: Answer, drawn: tuple[SampledToken, ...]) -> tuple[str, tuple[int, ...], End | None]:
        """Tokens become part of the answer until it ends or numbers are not finite. Text, tokens, and how it ended."""
        sequence, texts, taken = answer.sequence, list[str](), list[int]()
        for one in drawn:
            token = one.token
            if token is None:
                break
            sequence.first_token_s = sequence.first_token_s or self._clock()
            if token in self._eos and not sequence.ignore_eos:
                return "".join([*texts, answer.stream.finish()]), tuple(taken), _end(answer, "stop")
            sequence.tokens.append(token)
            taken.append(token)
            texts.append(answer.feed(token, one.scores))
            if answer.stream.stopped:
                return "".join(texts), tuple(taken), _end(answer, "stop")
            if len(sequence.tokens) >= sequence.total_max:
                last, reason = answer.finish()
                end = _end(answer, reason)
                if sequence.outgrows:  # what is held back may go on, so that it must not be shown yet
                    return "".join(texts), tuple(taken), _outgrown(end, last)
                return "".join([*texts, last]), tuple(taken), end
        return "".join(texts), tuple(taken), None

    def _judge(self, work: Work, right: int) -> None:
        drafted, guesser = len(work.drafts), work.sequence.guesser
        if drafted and guesser is not None:
            self.drafted += drafted
            self.accepted += right
            guesser.verified(drafted, right, work.sequence.answer_len)

    def _finish(self, answer: Answer, text: str, tokens: tuple[int, ...], end: End) -> Piece:
        self.scheduler.remove(answer.sequence)
        del self._answers[answer.sequence.id]
        self.rates.observe_finished(len(answer.sequence.tokens))
        return _piece(answer, text, tokens, end)


def context_max(config_context: int, pool_tokens: int) -> int:
    """Tokens of one sequence, prompt and answer: what the model knows and the pool holds."""
    return min(config_context, pool_tokens)


def _both(first: StepReport, second: StepReport) -> StepReport:
    return StepReport(
        first.pieces + second.pieces,
        first.prefill_tokens + second.prefill_tokens,
        first.decode_rows + second.decode_rows,
    )


def _piece(answer: Answer, text: str, tokens: tuple[int, ...], end: End | None) -> Piece:
    """The next piece of this answer; its offsets move on."""
    raw = text.encode()
    carried = tokens if answer.carries_tokens else ()
    piece = Piece(
        answer.sequence.id, answer.text_offset, raw, answer.token_offset, carried, end, answer.take_logprobs()
    )
    answer.text_offset += len(raw)
    answer.token_offset += len(carried)
    return piece


def _end(answer: Answer, reason: Literal["stop", "length", "cancelled"]) -> End:
    return End(reason, prompt_tokens=answer.sequence.prompt_len, new_tokens=answer.sequence.answer_len)


def _outgrown(end: End, last: str) -> End:
    """An end that is the context's; last: the text that it lets out."""
    return msgspec.structs.replace(end, outgrown=True, tail=last.encode())


def _broken(answer: Answer) -> End:
    return End(
        "error",
        prompt_tokens=answer.sequence.prompt_len,
        new_tokens=answer.sequence.answer_len,
        error_code="node_error",
        error_message="the model's logits are not finite",
        fault="node",
    )
