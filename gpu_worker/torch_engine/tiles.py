"""Attention in plain torch on any device, the same bits for a row whatever is beside it. The other backends' measure.

Rows of one batch are cut into groups that share a shape: decode rows of similar length together, each prefill chunk
alone. In a group the query heads of one key/value head act as further rows, so keys and values are never expanded.

Keys are taken in tiles of KV_TILE. Each tile gives scores, exponentials under the row's maximum, a sum and a weighted
sum of values, all of one fixed shape; tiles are added pairwise, neighbours first. A longer padding adds only tiles of
zeros at the end, and x + 0 = x, so a row's result depends neither on the lengths beside it nor on its chunk. The rows
of a product are padded to `row_multiple` (linear.py says why).
"""

import dataclasses
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from gpu_worker.torch_engine.batch import Batch, Piece
from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK
from gpu_worker.torch_engine.kv_cache import KVCache
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.rope import rotary_tables

KV_TILE = 128
BLOCKS_PER_TILE = KV_TILE // BLOCK_TOKENS
MULTIPLES = (1, 2, 4, 8, 16)
SPAN = 128  # query tokens of one group of a prefill chunk
GROUPED_ROWS_MAX = 16  # query tokens of a piece that may share a group with others


class TileAttention:
    kind = "tiles"
    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        blocks: int,
        *,
        context: int,
        exact: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """context: positions that a sequence may reach. exact: rows must come out in the same bits in any batch."""
        self.cache = KVCache(config, layers, blocks, device=device, dtype=dtype)
        self.config = config
        self.device = device
        self.row_multiple = probe_row_multiple(config.head_dim) if exact else 1
        self.cos, self.sin = rotary_tables(config, context, device, dtype)
        self.head_scale = torch.ones(config.heads + config.kv_heads, 1, device=device, dtype=dtype)
        self.head_scale[: config.heads] = config.head_dim**-0.5  # the attention's, put on queries as they rotate

    def plan(self, batch: Batch) -> "TileStep":
        positions = batch.positions.to(self.device)
        return TileStep(
            cache=self.cache,
            rows=batch.rows,
            slots=batch.slots.to(self.device),
            cos=self.cos[positions].unsqueeze(1) * self.head_scale,
            sin=self.sin[positions].unsqueeze(1) * self.head_scale,
            groups=tuple(
                build_group(span, self.config, self.row_multiple, self.device) for span in spans(batch.pieces)
            ),
        )

    def clear(self, blocks: list[int]) -> None:
        self.cache.clear(blocks)


@dataclasses.dataclass(frozen=True)
class TileStep:
    cache: KVCache
    rows: int
    slots: Tensor  # (rows,)
    cos: Tensor  # (rows, heads + kv_heads, head_dim), the queries' part scaled
    sin: Tensor
    groups: tuple["Group", ...]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        rotated = qkv[: self.rows, : self.cos.shape[1]]  # queries and keys side by side
        turned = rotated.roll(qkv.shape[2] // 2, -1).mul_(self.sin)
        rotated.mul_(self.cos).add_(turned)
        kv_heads = qkv.shape[1] - self.cos.shape[1]
        self.cache.write(layer, self.slots, qkv[: self.rows, self.cos.shape[1] - kv_heads :])
        results = [attend_group(qkv, self.cache, layer, group) for group in self.groups]
        return results[0] if len(results) == 1 else torch.cat(results)


@dataclasses.dataclass(frozen=True)
class Group:
    """`sequences` sequences with `per_sequence` query tokens each."""

    sequences: int
    per_sequence: int
    tiles: int
    query_rows: Tensor  # (kv_heads * sequences * tiles * rows,) flat (token, head) of each row; padding repeats one
    blocks: Tensor  # (sequences * tiles * BLOCKS_PER_TILE,) block tables, padded with the null block
    mask: Tensor  # (sequences, tiles, rows = per_sequence * group + padding, KV_TILE): 0 where visible, else -inf


@dataclasses.dataclass(frozen=True)
class Span:
    """What becomes one group: `count` consecutive rows of each of some neighbouring pieces."""

    pieces: list[Piece]  # of one count, cut to the span if there is only one
    tiles: int


def spans(pieces: Sequence[Piece]) -> list[Span]:
    """Neighbours with few rows of like length share a group; of a chunk every SPAN tokens are one.

    So scores stay small, and early parts of a chunk look at fewer keys.
    """
    found: list[Span] = []
    for (_, tiles), neighbours in groupby(pieces, key=_shape):
        if tiles is not None:
            found.append(Span(list(neighbours), tiles))
        else:
            found += [Span([part], tiles_for(part.length)) for piece in neighbours for part in _cut(piece)]
    return found


def _shape(piece: Piece) -> tuple[int, int | None]:
    """Rows, and tiles if the piece may share a group with others of the same shape."""
    return piece.count, round_tiles(tiles_for(piece.length)) if piece.count <= GROUPED_ROWS_MAX else None


def _cut(piece: Piece) -> list[Piece]:
    return [
        Piece(piece.first_row + at, piece.start + at, min(SPAN, piece.count - at), piece.blocks)
        for at in range(0, piece.count, SPAN)
    ]


def tiles_for(length: int) -> int:
    return -(-length // KV_TILE)


def round_tiles(tiles: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ...: few groups, and no row is padded to more than half again its length."""
    if tiles <= 4:
        return tiles
    power = 1 << (tiles.bit_length() - 1)
    return power if tiles == power else power * 3 // 2 if tiles <= power * 3 // 2 else power * 2


def build_group(span: Span, config: ModelConfig, row_multiple: int, device: torch.device) -> Group:
    first, sequences, width = span.pieces[0], len(span.pieces), span.tiles * BLOCKS_PER_TILE
    table: list[int] = []
    for piece in span.pieces:
        owned = piece.blocks[:width]
        table += owned + [NULL_BLOCK] * (width - len(owned))
    starts = torch.tensor([piece.start for piece in span.pieces], device=device)
    mask = causal_mask(starts, first.count, span.tiles, config.group, row_multiple)
    return Group(
        sequences=sequences,
        per_sequence=first.count,
        tiles=span.tiles,
        query_rows=query_rows(first.first_row, sequences, first.count, span.tiles, mask.shape[2], config, device),
        blocks=torch.tensor(table, device=device),
        mask=mask,
    )


def query_rows(
    first_row: int, sequences: int, per_sequence: int, tiles: int, rows: int, config: ModelConfig, device: torch.device
) -> Tensor:
    """Where each query row of a group lies in (tokens * (heads + 2 kv_heads), head_dim): once a tile, so one gather.

    Row r of a key/value head is query token r // group with head r % group of those that share it.
    """
    row = torch.arange(rows, device=device)
    row = torch.where(row < per_sequence * config.group, row, 0)
    token = first_row + torch.arange(sequences, device=device)[:, None] * per_sequence + row // config.group
    head = torch.arange(config.kv_heads, device=device)[:, None, None] * config.group + row % config.group
    flat = token * (config.heads + 2 * config.kv_heads) + head  # (kv_heads, sequences, rows)
    return flat.unsqueeze(2).expand(-1, -1, tiles, -1).reshape(-1)


def causal_mask(starts: Tensor, per_sequence: int, tiles: int, heads_per_kv_head: int, row_multiple: int) -> Tensor:
    """(sequences, tiles, rows, KV_TILE): row r is query token r // heads_per_kv_head and sees keys up to its own place.

    Padding rows see the first key only, so that their softmax has something to divide by.
    """
    rows = per_sequence * heads_per_kv_head
    padded = -(-rows // row_multiple) * row_multiple
    row = torch.arange(padded, device=starts.device)
    last = torch.where(row < rows, starts[:, None] + row // heads_per_kv_head, 0)  # (sequences, rows)
    key = torch.arange(tiles * KV_TILE, device=starts.device).view(1, tiles, 1, KV_TILE)
    hidden = key > last[:, None, :, None]
    return torch.zeros(hidden.shape, device=starts.device).masked_fill_(hidden, float("-inf"))


def attend_group(projected: Tensor, cache: KVCache, layer: int, group: Group) -> Tensor:
    """projected: (tokens, heads + 2 kv_heads, head_dim), its queries rotated and scaled, its keys and values written.

    Returns (tokens of the group, heads * head_dim).
    """
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


def from_rows(rows: Tensor, group: Group, heads: int) -> Tensor:
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
