"""Which tokens the next step computes. Pure: no tensors, no clock.

One step is one flat batch `[decode rows | prefill chunks]` of at most `budget` further rows beside the decode rows, so
running answers go on while prompts come in. In this order:

1. Running answers, oldest first, get a block for their next token if they need one. When none is free the youngest
   running sequence is preempted: its blocks go back, its tokens stay, and it waits at the front to be computed again.
   The oldest is never preempted for a younger one, so there is always progress.
2. Prompts, oldest first, each as much as the budget leaves; the next waiting one is admitted when those before it are
   done: while a slot and blocks for all it holds so far, plus a reserve for the running ones, are there. Full blocks
   that others computed are reused. While a long prompt lasts, half of the budget is for much shorter ones behind it,
   which never take a slot or a block that somebody before them will need.
3. What the budget then leaves goes to drafts (speculation.py): guesses of what running answers say next.

Steps may be planned ahead: a step that is launched and not yet read (in flight) has computed what it will compute as
far as planning is concerned, but its tokens are not known. Three rules keep that safe. The input of such a sequence's
next row is `late`: the device puts it in. Blocks of a sequence that ends stay its own until the last step that writes
to them was read. And nobody is preempted while a step is in flight: the plan is empty, so that the core reads first.

A sequence never holds more tokens than the pool (`total_max` sees to it), so one that runs alone always fits.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

from gpu_worker.torch_engine.kv_blocks import BlockPool, chain_hash
from gpu_worker.torch_engine.plan import Plan, Work, next_work
from gpu_worker.torch_engine.sequence import Sequence, State
from gpu_worker.torch_engine.step_time import Piece

SHORTER = 4  # a prompt this many times shorter than what is left of the one before it need not wait for all of it


class Scheduler:
    def __init__(self, pool: BlockPool, *, capacity: int, chunk_max: int) -> None:
        self.pool = pool
        self.capacity = capacity  # running sequences at once
        self.chunk_max = chunk_max  # prompt tokens and drafts of one step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.leaving: list[Sequence] = []  # over, but a step in flight still writes to their blocks
        self.preemptions = 0
        self._in_flight = 0  # works launched and not yet read

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self.leaving

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over, for whatever reason: its blocks go back as soon as nothing can write to them."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            if sequence.in_flight:
                self.leaving.append(sequence)
            else:
                self._free(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def answers(self) -> list[Piece]:
        """What the next step computes of running answers: one token each."""
        return [(one.cached_len, 1) for one in self._answering()]

    def prompts(self) -> Iterator[Piece]:
        """(computed, still to compute) of each prompt that has a slot or could have one, about as `plan` takes them.

        Behind them the drafts: they share the budget.
        """
        for one in self.running:
            if one.pending > 1:
                yield one.cached_len, one.pending
        for one in islice(self.waiting, max(0, self.capacity - len(self.running))):
            reused = len(self._reusable(one)) * self.pool.block_tokens
            yield reused, len(one.tokens) - reused
        if self.guessing:
            yield max(one.cached_len for one in self.running), self.chunk_max

    @property
    def arriving(self) -> int:
        """Sequences that wait for their first token and have a slot, or could have one."""
        slots = min(self.capacity, len(self.running) + len(self.waiting))
        return slots - len(self._answering())

    @property
    def oldest_prompt_s(self) -> float:
        """When the first of those came that wait for their first token; infinite if none does."""
        begun = (one.arrived_s for one in self.running if one.pending > 1)
        return min((*begun, *(one.arrived_s for one in islice(self.waiting, 1))), default=math.inf)

    @property
    def waiting_tokens(self) -> int:
        """What the waiting sequences hold once they run, without what they will answer."""
        return sum(len(one.tokens) for one in self.waiting)

    @property
    def guessing(self) -> bool:
        """Whether some answer may get drafts in the next step: its tokens must be read before that is planned."""
        return any(one.guesser is not None and one.guesser.eager(one.answer_len) for one in self.running)

    def private_blocks(self, sequence: Sequence) -> list[int]:
        """Those that nobody else can have: content that has a name was right when it got it."""
        return [block for block in sequence.blocks if block not in self.pool.hash_of]

    def plan(self, budget: int | None = None, *, drafts: bool = True) -> Plan:
        """The next step. Blocks for all its tokens are in place.

        budget: prompt tokens and drafts of this step, at most `chunk_max`, which is the default; 0 only beside answers.
        drafts: whether there may be any.
        Empty only if nothing waits or runs, or if what is in flight has to be read first.
        """
        budget = self.chunk_max if budget is None else budget
        answering = self._answering()
        if self._in_flight and sum(map(self._missing, answering)) > self.pool.free:
            return Plan()
        decode = [next_work(one, 1) for one in answering if self._make_room(one)]
        prompts = self._plan_prompts(budget)
        decode += [work for work in prompts if work.sequence.pending == 1]
        budget -= sum(work.count for work in prompts)
        return Plan(
            tuple(self._with_drafts(decode, budget) if drafts else decode),
            tuple(work for work in prompts if work.sequence.pending > 1),
        )

    def launched(self, plan: Plan) -> None:
        """The step is on its way: the next one may be planned as if it were done."""
        for work in plan.work:
            sequence = work.sequence
            sequence.cached_len = work.start + work.count - len(work.drafts)
            sequence.in_flight += 1
            sequence.unread += 1 if work.samples else 0
        self._in_flight += len(plan.work)

    def collected(self, work: Work, valid: int) -> None:
        """The work was read, and its tokens are with the sequence: full blocks become findable for others.

        valid: rows whose keys and values are right: without rejected drafts; 0 if its numbers are not finite.
        """
        sequence = work.sequence
        sequence.in_flight -= 1
        sequence.unread -= 1 if work.samples else 0
        self._in_flight -= 1
        if sequence.state is State.FINISHED:
            if not sequence.in_flight:
                self.leaving.remove(sequence)
                self._free(sequence)
            return
        end = min(work.start + valid, len(sequence.tokens))
        if work.drafts:
            sequence.cached_len = end
        if self.pool.prefix_cache:
            size = self.pool.block_tokens
            for index in range(work.start // size, end // size):
                self.pool.publish(sequence.blocks[index], self._block_name(sequence, index))

    def preempt(self, sequence: Sequence) -> None:
        """Its blocks go back, its tokens stay: computed again later."""
        assert not sequence.in_flight, "preempted while a step writes to its blocks"
        self._free(sequence)
        self.running.remove(sequence)
        sequence.state = State.WAITING
        sequence.cached_len = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def check_integrity(self) -> None:
        self.pool.check_integrity([sequence.blocks for sequence in [*self.running, *self.leaving]])
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence owns blocks"
        in_flight = sum(sequence.in_flight for sequence in [*self.running, *self.leaving])
        assert in_flight == self._in_flight, "works in flight are not those of the sequences"

    def _answering(self) -> list[Sequence]:
        return [one for one in self.running if one.pending == 1 and not one.complete]

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that its next token needs and it does not have."""
        return max(0, self.pool.blocks_for(sequence.cached_len + 1) - len(sequence.blocks))

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for the next token, preempting younger sequences if need be; False if it was preempted itself."""
        if sequence.state is not State.RUNNING:
            return False  # preempted for an older one a moment ago
        missing = self._missing(sequence)
        while missing > self.pool.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.take(missing)
        return True

    def _plan_prompts(self, budget: int) -> list[Work]:
        """Oldest first; beside one that does not come to its end, much shorter ones get up to half of the budget."""
        works: list[Work] = []
        while budget > 0 and (head := self._next_prompt(works)) is not None:
            if head.pending > budget:
                shorter = self._plan_shorter(head, budget // 2)
                works += shorter
                budget -= sum(work.count for work in shorter)
            works.append(next_work(head, min(head.pending, budget)))
            budget -= works[-1].count
        return works

    def _next_prompt(self, planned: list[Work]) -> Sequence | None:
        known = {id(work.sequence) for work in planned}
        running = (one for one in self.running if one.pending > 1 and id(one) not in known)
        return next(running, None) or self._admit_next()

    def _plan_shorter(self, head: Sequence, budget: int) -> list[Work]:
        """Those that run already come first, so that what is begun gets done."""
        works: list[Work] = []
        for other in self._shorter_than(head):
            if budget <= 0:
                break
            if other.state is State.RUNNING or self._admit(other, self._needed_before(other)):
                works.append(next_work(other, min(other.pending, budget)))
                budget -= works[-1].count
        return works

    def _shorter_than(self, head: Sequence) -> Iterator[Sequence]:
        """Prompts behind this one that are much shorter than what is left of it, and have a slot or could have one."""
        behind = self.running[self.running.index(head) + 1 :]
        with_slot = list(islice(self.waiting, self.capacity - len(self.running)))
        return (one for one in [*behind, *with_slot] if 1 < one.pending <= head.pending // SHORTER)

    def _needed_before(self, sequence: Sequence) -> int:
        """Blocks for all that wait before this one: whoever passes them leaves them these."""
        before = islice(self.waiting, self.waiting.index(sequence))
        return sum(self.pool.blocks_for(len(one.tokens)) for one in before)

    def _with_drafts(self, decode: list[Work], budget: int) -> Iterator[Work]:
        for work in decode:
            drafts = self._guess(work, budget)
            budget -= len(drafts)
            yield dataclasses.replace(work, tokens=work.tokens + drafts, sampled=1 + len(drafts)) if drafts else work

    def _guess(self, work: Work, budget: int) -> tuple[int, ...]:
        """Drafts that have a place in the sequence's blocks; one more block is taken if nobody else wants it."""
        sequence = work.sequence
        if sequence.guesser is None or work.late:
            return ()
        room = min(budget, sequence.total_max - len(sequence.tokens) - 1)  # the last token is drawn, never guessed
        drafts = sequence.guesser.guess(sequence.tokens, sequence.answer_len, room)
        places = len(sequence.blocks) * self.pool.block_tokens - len(sequence.tokens)
        if places < len(drafts) and not self.waiting and self.pool.free > len(self.running):
            sequence.blocks += self.pool.take(1)
            places += self.pool.block_tokens
        return drafts[:places]

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _admit_next(self) -> Sequence | None:
        head = self.waiting[0] if self.waiting else None
        return head if head is not None and self._admit(head, needed_before=0) else None

    def _admit(self, sequence: Sequence, needed_before: int) -> bool:
        """A slot, and blocks for all its tokens, if beside them `needed_before` and a reserve stay free.

        The reserve is a block for each running sequence, and as many more as often as this one was preempted: it would
        be again soon, and computed in vain.
        """
        if len(self.running) >= self.capacity:
            return False
        reused = self._reusable(sequence)
        # Reused blocks that lie idle count as free now and will not once they are taken.
        idle_reused = sum(1 for block in reused if block in self.pool.idle)
        fresh_needed = self.pool.blocks_for(len(sequence.tokens)) - len(reused)
        reserve = len(self.running) * (1 + sequence.preemptions)
        if self.pool.free - idle_reused < fresh_needed + needed_before + reserve:
            return False
        self.waiting.remove(sequence)
        for block in reused:
            self.pool.reuse(block)
        sequence.blocks = reused + self.pool.take(fresh_needed)
        sequence.cached_len = sequence.reused_tokens = len(reused) * self.pool.block_tokens
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return True

    def _reusable(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest known prefix; at least one token stays pending, because its logits are needed."""
        blocks: list[int] = []
        if not self.pool.prefix_cache:
            return blocks
        for index in range((len(sequence.tokens) - 1) // self.pool.block_tokens):
            block = self.pool.find(self._block_name(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _block_name(self, sequence: Sequence, index: int) -> bytes:
        """Chain hash of a full block; each is computed once in a sequence's life, since its tokens never change."""
        size = self.pool.block_tokens
        while len(sequence.hashes) <= index:
            at = len(sequence.hashes)
            previous = sequence.hashes[-1] if at else b""
            sequence.hashes.append(chain_hash(previous, sequence.tokens[at * size : (at + 1) * size]))
        return sequence.hashes[index]
