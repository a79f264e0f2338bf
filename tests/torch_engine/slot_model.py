"""A model whose keys are the tokens themselves: what a row reads through its block table, it says.

The next token is a hash of all tokens that the row finds in its sequence's slots. A block given to two owners, a slot
written too late, a draft that was rejected and is still seen, a wrong token put into a late row: each changes the text.
Tokens are few and mostly follow from the two before them, so guesses (speculation.py) are often right, and not always.
Costs microseconds, so whole lives of engines can be tried by the hundred.
"""

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.torch_engine.assembly import Assembled
from gpu_worker.torch_engine.batch import Batch
from gpu_worker.torch_engine.core import EngineCore
from gpu_worker.torch_engine.kv_blocks import BlockPool
from gpu_worker.torch_engine.runner import Runner
from gpu_worker.torch_engine.scheduler import Scheduler
from gpu_worker.torch_engine.text_model import TextModel

PRIME = (1 << 31) - 1
SAID = 9  # tokens that are ever said: the letters from 'a' on
NOTHING = -1  # what a slot holds that nobody wrote


class SlotModel:
    kind = "slots"

    def __init__(self, blocks: int, text: TextModel, *, block_tokens: int, row_s: float) -> None:
        self.block_tokens = block_tokens
        self.poison = NOTHING - 1  # a token whose numbers are not finite
        self.now_s = 0.0  # its own clock: a step takes 10 ms and `row_s` a row
        self._row_s = row_s
        self._slots = [NOTHING] * ((blocks + 1) * block_tokens)
        self._said = [text.encode(chr(ord("a") + n), special=False)[0] for n in range(SAID)]
        self._vocabulary = text.vocabulary

    def forward(self, batch: Batch) -> Tensor:
        """(rows, 2): a hash of all tokens up to the row, and one of the last two."""
        self.now_s += 0.01 + batch.rows * self._row_s
        for slot, token in zip(batch.slots.tolist(), batch.tokens.tolist(), strict=True):
            self._slots[slot] = token
        rows: list[tuple[float, float]] = []
        for piece in batch.pieces:
            size = self.block_tokens
            seen = [self._slots[block * size + place] for block in piece.blocks for place in range(size)]
            assert NOTHING not in seen[: piece.length], "a row reads a slot that was never written"
            if self.poison in seen:  # also one that is masked: 0 times infinity is not 0
                rows += [(math.nan, math.nan)] * piece.count
                continue
            whole, before = 7, 0
            for position, token in enumerate(seen[: piece.length]):
                whole = (whole * 1_000_003 + token + 1) % PRIME
                if position >= piece.start:
                    rows.append((whole, before * 1_009 + token))
                before = token
        return torch.tensor(rows, dtype=torch.float64)

    def logits(self, hidden: Tensor) -> Tensor:
        """Mostly by the last two tokens, else by all of them; the second likeliest is near, so that draws differ."""
        logits = torch.full((hidden.shape[0], self._vocabulary), -30.0)
        for row, (whole, last_two) in enumerate(hidden.nan_to_num(0).long().tolist()):
            base = last_two if whole % 5 else whole
            logits[row, self._said[base * 7919 % 104_729 % SAID]] = 2.0
            logits[row, self._said[whole % SAID]] += 1.0 if whole % 3 else 30.5
        return logits + 0 * hidden[:, :1].float()

    def clear(self, blocks: list[int]) -> None:
        for block in blocks:
            self._slots[block * self.block_tokens : (block + 1) * self.block_tokens] = [0] * self.block_tokens


def slot_engine(
    directory: Path,
    *,
    blocks: int = 256,
    block_tokens: int = 4,
    capacity: int = 8,
    chunk_max: int = 64,
    prefix_cache: bool = True,
    speculate: int = 0,
    depth: int = 0,
    eos: frozenset[int] = frozenset(),
    row_s: float = 0.0001,
) -> Assembled:
    """directory: of a tiny model, for its tokenizer."""
    text = _text(directory)
    model = SlotModel(blocks, text, block_tokens=block_tokens, row_s=row_s)
    scheduler = Scheduler(
        BlockPool(blocks, block_tokens, prefix_cache=prefix_cache), capacity=capacity, chunk_max=chunk_max
    )
    core = EngineCore(
        Runner(model, device=torch.device("cpu"), depth=depth),
        scheduler,
        eos=eos or text.eos,
        speculate=speculate,
        clock=lambda: model.now_s,
    )
    return Assembled(core, model, text, blocks * block_tokens, 1, "", 1, 1)


@cache
def _text(directory: Path) -> TextModel:
    return TextModel(directory)
