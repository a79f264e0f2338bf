"""Which tokens the next step computes. Pure: no tensors, no clock.

One step is one flat batch `[decode rows | prefill chunks]` of at most `chunk_max` prompt tokens beside the decode
rows, so running answers go on while prompts come in. In this order:

1. Running sequences, oldest first, get blocks for their next tokens. When none are free the youngest running sequence
   is preempted: its blocks go back, its tokens stay, and it waits at the front to be computed again. The oldest is
   never preempted for a younger one, so there is always progress.
2. Waiting sequences are admitted, first come first served, while a slot, tokens of the budget and blocks for all they
   hold so far plus one free block per running sequence are there. Full blocks that others computed are reused.

A sequence never holds more tokens than the pool (`total_max` sees to it), so one that runs alone always fits.
"""

import dataclasses
from collections import deque

from gpu_worker.torch_engine.kv_blocks import BlockPool, chain_hash
from gpu_worker.torch_engine.sequence import Sequence, State


@dataclasses.dataclass(frozen=True)
class Work:
    """Compute `count` tokens of one sequence from `start` on. The last pending one gives logits to sample from.

    drafts: guesses of what follows the sequence's last token, part of `count`; each gives logits too, to be verified.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        return self.start + self.count >= len(self.sequence.tokens)

    @property
    def sampled(self) -> int:
        """How many of the last rows a token is drawn from."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.sequence.tokens[self.start : self.start + self.count], *self.drafts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """`decode` rows have count 1 and always sample; `prefill` chunks sample when they reach the end."""

    decode: tuple[Work, ...] = ()
    prefill: tuple[Work, ...] = ()

    @property
    def work(self) -> tuple[Work, ...]:
        return self.decode + self.prefill

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


class Scheduler:
    def __init__(self, pool: BlockPool, *, capacity: int, chunk_max: int) -> None:
        self.pool = pool
        self.capacity = capacity  # running sequences at once
        self.chunk_max = chunk_max  # prompt tokens of one step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over, for whatever reason: its blocks go back at once."""
        if sequence.state is State.RUNNING:
            self._free(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    @property
    def answering(self) -> int:
        """Running answers that wait for their next token."""
        return sum(1 for sequence in self.running if sequence.pending == 1)

    @property
    def arriving(self) -> int:
        """Sequences that wait for their first token and have a slot, or could have one."""
        slots = min(self.capacity, len(self.running) + len(self.waiting))
        return slots - self.answering

    def plan(self, budget: int | None = None) -> Plan:
        """The next step; empty only if nothing waits or runs. Blocks for all its tokens are in place.

        budget: prompt tokens of this step, at least 1 and at most `chunk_max`, which is the default.
        """
        decode: list[Work] = []
        prefill: list[Work] = []
        budget = self.chunk_max if budget is None else budget
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:
                continue  # preempted for an older one a moment ago
            count = sequence.pending if sequence.pending == 1 else min(sequence.pending, budget)
            if count == 0 or not self._make_room(sequence, sequence.cached_len + count):
                continue
            if sequence.pending == 1:
                decode.append(Work(sequence, sequence.cached_len, 1))
            else:
                prefill.append(Work(sequence, sequence.cached_len, count))
                budget -= count
        while budget > 0 and (admitted := self._admit()) is not None:
            count = min(admitted.pending, budget)
            (decode if admitted.pending == 1 else prefill).append(Work(admitted, admitted.cached_len, count))
            budget -= count
        return Plan(tuple(decode), tuple(prefill))

    def computed(self, work: Work) -> None:
        """Keys and values of this piece are stored; full blocks become findable for others."""
        sequence = work.sequence
        sequence.cached_len = work.start + work.count
        if not self.pool.prefix_cache:
            return
        size = self.pool.block_tokens
        for index in range(work.start // size, sequence.cached_len // size):
            self.pool.publish(sequence.blocks[index], self._block_name(sequence, index))

    def check_integrity(self) -> None:
        self.pool.check_integrity([sequence.blocks for sequence in self.running])
        assert all(not sequence.blocks for sequence in self.waiting), "a waiting sequence owns blocks"

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for `length` tokens, preempting younger sequences if need be; False if it was preempted itself."""
        missing = self.pool.blocks_for(length) - len(sequence.blocks)
        while missing > self.pool.free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.pool.take(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        self.running.remove(sequence)
        sequence.state = State.WAITING
        sequence.cached_len = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _admit(self) -> Sequence | None:
        if not self.waiting or len(self.running) >= self.capacity:
            return None
        sequence = self.waiting[0]
        reused = self._reusable(sequence)
        # Reused blocks that lie idle count as free now and will not once they are taken.
        idle_reused = sum(1 for block in reused if block in self.pool.idle)
        fresh_needed = self.pool.blocks_for(len(sequence.tokens)) - len(reused)
        if self.pool.free - idle_reused < fresh_needed + len(self.running):
            return None
        self.waiting.popleft()
        for block in reused:
            self.pool.reuse(block)
        sequence.blocks = reused + self.pool.take(fresh_needed)
        sequence.cached_len = sequence.reused_tokens = len(reused) * self.pool.block_tokens
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return sequence

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
