"""Who owns which KV block. Pure bookkeeping: no tensors, no clock.

Every block but one is at each moment in exactly one of these places:

    | place      | references | findable by hash | leaves by                                        |
    |------------|-----------:|------------------|--------------------------------------------------|
    | fresh      |          0 | no               | `take`                                           |
    | idle       |          0 | yes              | `reuse` (prefix hit), or `take` (oldest first)   |
    | owned      |        >=1 | once it is full  | `release` by its last owner: to idle if findable |

Block 0 is the null block: it stays zero, nobody owns it, and block tables are padded with it.

A full block is named by a chain hash over all tokens up to its end, so equal names mean equal content. Only full blocks
are shared and a shared block is never written, because a sequence writes only positions it has not computed yet.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

NULL_BLOCK = 0


class BlockTableError(Exception):
    """A block was released or reused that nobody owns: a bug of ours."""


def chain_hash(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block: the blocks before it and its own tokens."""
    return hashlib.blake2b(
        previous + b"".join(token.to_bytes(4, "little") for token in tokens), digest_size=16
    ).digest()


class BlockPool:
    """`total` usable blocks of `block_tokens` tokens, numbered 1..total."""

    def __init__(self, total: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self.fresh: list[int] = list(range(total, 0, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.references = [0] * (total + 1)
        self.by_hash: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self.fresh) + len(self.idle)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each. The caller has checked `free`."""
        assert count <= self.free, "take more blocks than are free"
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self.fresh:
            block = self.fresh.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            del self.by_hash[self.hash_of.pop(block)]
        self.references[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """The block with this content, if it is still there."""
        return self.by_hash.get(name)

    def reuse(self, block: int) -> None:
        """One more owner of a findable block."""
        if block not in self.hash_of:
            raise BlockTableError(f"block {block} has no name, so it cannot be shared")
        self.idle.pop(block, None)
        self.references[block] += 1

    def publish(self, block: int, name: bytes) -> None:
        """Make a full, owned block findable. If another block has this name already, that one stays known."""
        if self.prefix_cache and name not in self.by_hash and block not in self.hash_of:
            self.by_hash[name] = block
            self.hash_of[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference on each. Later blocks age first: a shared prefix is worth more than its tail."""
        for block in reversed(blocks):
            if self.references[block] < 1:
                raise BlockTableError(f"block {block} released, but nobody owns it")
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.hash_of:
                    self.idle[block] = None
                else:
                    self.fresh.append(block)

    def check_integrity(self, owned: Sequence[Sequence[int]]) -> None:
        """Every block is in one place, and references are exactly those of the given block tables."""
        counted = [0] * (self.total + 1)
        for table in owned:
            for block in table:
                counted[block] += 1
        assert counted[NULL_BLOCK] == 0, "the null block is owned"
        assert counted == self.references, "references differ from the block tables"
        places = sorted([*self.fresh, *self.idle, *(b for b in range(1, self.total + 1) if self.references[b])])
        assert places == list(range(1, self.total + 1)), "a block is lost or in two places"
        assert {block: name for name, block in self.by_hash.items()} == self.hash_of, "names and blocks disagree"
        assert all(block in self.hash_of for block in self.idle), "an idle block has no name"
