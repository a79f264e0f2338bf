"""Attention over paged keys and values, the same bits for a row whatever is beside it.

Rows of one batch are cut into groups that share a shape: decode rows of similar length together, each prefill chunk
alone. In a group the query heads of one key/value head act as further rows, so keys and values are never expanded.

Keys are taken in tiles of KV_TILE. Each tile gives scores, exponentials under the row's maximum, a sum and a weighted
sum of values, all of one fixed shape; tiles are added pairwise, neighbours first. A longer padding adds only tiles of
zeros at the end, and x + 0 = x, so a row's result depends neither on the lengths beside it nor on its chunk. The rows
of a product are padded to `row_multiple` (linear.py says why). `reference_attend` is the slow, obvious form.
"""

import dataclasses

import torch
from torch import Tensor

from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.kv_cache import KVCache

KV_TILE = 128
BLOCKS_PER_TILE = KV_TILE // BLOCK_TOKENS
MULTIPLES = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class AttentionGroup:
    """`sequences` sequences with `per_sequence` query tokens each."""

    sequences: int
    per_sequence: int
    tiles: int
    query_rows: Tensor  # (kv_heads * sequences * tiles * rows,) flat (token, head) of each row; padding repeats one
    blocks: Tensor  # (sequences * tiles * BLOCKS_PER_TILE,) block tables, padded with the null block
    mask: Tensor  # (sequences, tiles, rows = per_sequence * group + padding, KV_TILE): 0 where visible, else -inf


def attend(projected: Tensor, cache: KVCache, layer: int, groups: tuple[AttentionGroup, ...]) -> Tensor:
    """projected: (tokens, heads + 2 kv_heads, head_dim), its queries rotated and scaled, its keys and values written.

    Returns (tokens of the groups, heads * head_dim).
    """
    results = [_attend_group(projected, cache, layer, group) for group in groups]
    return results[0] if len(results) == 1 else torch.cat(results)


def _attend_group(projected: Tensor, cache: KVCache, layer: int, group: AttentionGroup) -> Tensor:
    keys, values = cache.gather(layer, group.blocks)
    kv_heads, head_dim = keys.shape[0], keys.shape[3]
    batch, tiles, count = kv_heads * group.sequences, group.tiles, group.mask.shape[2]
    keys = keys.view(batch * tiles, KV_TILE, head_dim)
    values = values.view(batch * tiles, KV_TILE, head_dim)
    rows = projected.view(-1, head_dim).index_select(0, group.query_rows).view(batch * tiles, count, head_dim)

    scores = torch.bmm(rows, keys.transpose(1, 2))  # (batch * tiles, rows, KV_TILE)
    tiled = scores.view(kv_heads, group.sequences, tiles, count, KV_TILE)
    tiled.add_(group.mask)
    tiled.sub_(tiled.amax((2, 4), keepdim=True)).exp_()
    total = add_tiles(tiled.sum(-1))  # (kv_heads, sequences, rows)
    weighted = add_tiles(torch.bmm(scores, values).view(kv_heads, group.sequences, tiles, count, head_dim))
    return from_rows(weighted.div_(total.unsqueeze(-1)), group, projected.shape[1] - 2 * kv_heads)


def from_rows(rows: Tensor, group: AttentionGroup, heads: int) -> Tensor:
    """(kv_heads, sequences, rows, head_dim) -> (tokens, heads * head_dim), padding dropped."""
    kv_heads, sequences, _, head_dim = rows.shape
    per_kv_head = heads // kv_heads
    kept = rows[:, :, : group.per_sequence * per_kv_head]
    shaped = kept.view(kv_heads, sequences, group.per_sequence, per_kv_head, head_dim).permute(1, 2, 0, 3, 4)
    return shaped.reshape(sequences * group.per_sequence, heads * head_dim)


def add_tiles(parts: Tensor) -> Tensor:
    """Sum over dimension 2, neighbours first, so that zero tiles at the end change no bit. torch.sum would regroup."""
    while (tiles := parts.shape[2]) > 1:
        even = tiles // 2 * 2
        pairs = parts[:, :, 0:even:2] + parts[:, :, 1:even:2]
        parts = pairs if even == tiles else torch.cat([pairs, parts[:, :, even:]], dim=2)
    return parts.squeeze(2)


def probe_row_multiple(head_dim: int) -> int:
    """The least multiple of rows at which both products give a row the same bits; the largest if none does."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3, 192, head_dim, generator=generator)
    keys = torch.randn(3, KV_TILE, head_dim, generator=generator)

    def both(count: int) -> Tensor:
        return torch.bmm(torch.bmm(rows[:, :count].contiguous(), keys.transpose(1, 2)), keys)

    whole = both(192)
    counts = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 36, 48, 64, 96, 128)
    same = {count: torch.equal(both(count), whole[:, :count]) for count in counts}
    return next((m for m in MULTIPLES if all(same[c] for c in counts if c % m == 0)), MULTIPLES[-1])


def reference_attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Plain causal attention of one sequence, for tests.

    query: (tokens, heads, head_dim), scaled, at `positions`; keys, values: (length, kv_heads, head_dim).
    """
    repeat = query.shape[1] // keys.shape[1]
    scores = torch.einsum("thd,shd->hts", query, keys.repeat_interleave(repeat, 1))
    hidden = torch.arange(keys.shape[0])[None, :] > positions[:, None]
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return torch.einsum("hts,shd->thd", weights, values.repeat_interleave(repeat, 1)).flatten(1)
