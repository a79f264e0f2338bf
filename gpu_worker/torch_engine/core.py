"""One step of the engine: schedule, batch, forward, sample, complete. No asyncio, no thread, no bus."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gpu_worker.engine import End, EngineLoad, Piece
from gpu_worker.torch_engine.batch import Batch, build_batch
from gpu_worker.torch_engine.model import Model
from gpu_worker.torch_engine.prompt import Answer
from gpu_worker.torch_engine.rates import Rates, capacity_now, prompt_budget
from gpu_worker.torch_engine.sampler import sample
from gpu_worker.torch_engine.scheduler import Plan, Scheduler, Work
from gpu_worker.torch_engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step did: pieces to publish, and how much work it was."""

    pieces: tuple[Piece, ...]
    prefill_tokens: int
    decode_rows: int


class EngineCore:
    """Owns the sequences. Every answer that is added ends with exactly one piece that carries an End."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.rates = Rates()
        self.last_progress_s = clock()
        self._model = model
        self._eos = eos
        self._clock = clock
        self._answers: dict[str, Answer] = {}

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, answer: Answer) -> list[Piece]:
        """Queue an answer. A forced prefix may already have something to say, or be all there is to say."""
        if answer.ready_end is not None:
            return [_piece(answer, answer.ready_text, (), answer.ready_end)]
        self._answers[answer.sequence.id] = answer
        answer.sequence.arrived_s = self._clock()
        self.scheduler.add(answer.sequence)
        return [_piece(answer, answer.ready_text, (), None)] if answer.ready_text else []

    def cancel(self, sequence_id: str) -> list[Piece]:
        """End it now; unknown ids are ignored."""
        answer = self._answers.get(sequence_id)
        return [] if answer is None else [self._finish(answer, "", (), _end(answer, "cancelled"))]

    @torch.inference_mode()
    def step(self) -> StepReport:
        began_s = self._clock()
        plan = self.scheduler.plan(self._prompt_budget())
        if not plan.work:
            return StepReport((), 0, 0)
        batch = build_batch(plan, block_tokens=self._model.block_tokens)
        hidden = self._model.forward(batch)[batch.last_rows]
        healthy, broken = self._sort_out(batch, hidden)
        for row in healthy:
            self.scheduler.computed(batch.work[row])
        sampled = [row for row in healthy if batch.work[row].samples]
        tokens = self._sample([batch.work[row].sequence for row in sampled], hidden[sampled])
        pieces = [self._give_up(batch.work[row]) for row in broken]
        pieces += [self._complete(batch.work[row], token) for row, token in zip(sampled, tokens, strict=True)]
        if self.scheduler.idle:
            self.scheduler.check_integrity()
        return self._report(plan, pieces, began_s)

    def load(self, *, arriving: int = 0) -> EngineLoad:
        """arriving: requests that are not sequences yet."""
        pool, running = self.scheduler.pool, len(self.scheduler.running)
        waiting = len(self.scheduler.waiting) + arriving
        return EngineLoad(
            prefill_rate=self.rates.prefill_rate,
            decode_rate=self.rates.decode_rate,
            capacity=capacity_now(
                slots=self.scheduler.capacity,
                present=running + waiting,
                free_tokens=pool.free * pool.block_tokens,
                sequence_tokens=self.rates.sequence_tokens,
            ),
            running=running,
            waiting=waiting,
            free_blocks=pool.free,
            total_blocks=pool.total,
            idle=self.idle and not arriving,
            last_progress_s=self.last_progress_s,
        )

    def _prompt_budget(self) -> int:
        scheduler = self.scheduler
        return prompt_budget(
            self.rates, chunk_max=scheduler.chunk_max, answering=scheduler.answering, arriving=scheduler.arriving
        )

    def _sort_out(self, batch: Batch, hidden: Tensor) -> tuple[list[int], list[int]]:
        """Which work came out finite and which did not. A last row sees all before it, so it tells for the whole."""
        finite = torch.isfinite(hidden).all(-1).tolist()
        return [row for row, fine in enumerate(finite) if fine], [row for row, fine in enumerate(finite) if not fine]

    def _sample(self, sequences: list[Sequence], hidden: Tensor) -> list[int | None]:
        if not sequences:
            return []
        logits = self._model.logits(hidden)
        return sample(logits, [s.sampling for s in sequences], [s.answer_len for s in sequences])

    def _give_up(self, work: Work) -> Piece:
        """Numbers that are not finite: this sequence fails, and nothing of it reaches the next owner of its blocks."""
        self._model.clear(work.sequence.blocks)
        answer = self._answers[work.sequence.id]
        return self._finish(answer, "", (), _broken(answer))

    def _complete(self, work: Work, token: int | None) -> Piece:
        """One more token of one answer: its text, and whether that was the last."""
        sequence = work.sequence
        answer = self._answers[sequence.id]
        if token is None:
            return self._give_up(work)
        if not sequence.first_token_s:
            sequence.first_token_s = self._clock()
        if token in self._eos and not sequence.ignore_eos:
            return self._finish(answer, answer.stream.finish(), (), _end(answer, "stop"))
        sequence.tokens.append(token)
        text = answer.stream.feed(token)
        if answer.stream.stopped:
            return self._finish(answer, text, (token,), _end(answer, "stop"))
        if len(sequence.tokens) >= sequence.total_max:
            return self._finish(answer, text + answer.stream.finish(), (token,), _end(answer, "length"))
        return _piece(answer, text, (token,), None)

    def _finish(self, answer: Answer, text: str, tokens: tuple[int, ...], end: End) -> Piece:
        self.scheduler.remove(answer.sequence)
        del self._answers[answer.sequence.id]
        self.rates.observe_finished(len(answer.sequence.tokens))
        return _piece(answer, text, tokens, end)

    def _report(self, plan: Plan, pieces: list[Piece], began_s: float) -> StepReport:
        self.last_progress_s = self._clock()
        prefill, decode = sum(work.count for work in plan.prefill), len(plan.decode)
        self.rates.observe(prefill_tokens=prefill, decode_rows=decode, seconds=self.last_progress_s - began_s)
        return StepReport(tuple(pieces), prefill, decode)


def context_max(config_context: int, pool_tokens: int) -> int:
    """Tokens of one sequence, prompt and answer: what the model knows and the pool holds."""
    return min(config_context, pool_tokens)


def _piece(answer: Answer, text: str, tokens: tuple[int, ...], end: End | None) -> Piece:
    """The next piece of this answer; its offsets move on."""
    raw = text.encode()
    carried = tokens if answer.carries_tokens else ()
    piece = Piece(answer.sequence.id, answer.text_offset, raw, answer.token_offset, carried, end)
    answer.text_offset += len(raw)
    answer.token_offset += len(carried)
    return piece


def _end(answer: Answer, reason: Literal["stop", "length", "cancelled"]) -> End:
    return End(reason, prompt_tokens=answer.sequence.prompt_len, new_tokens=answer.sequence.answer_len)


def _broken(answer: Answer) -> End:
    return End(
        "error",
        prompt_tokens=answer.sequence.prompt_len,
        new_tokens=answer.sequence.answer_len,
        error_code="node_error",
        error_message="the model's logits are not finite",
        fault="node",
    )
