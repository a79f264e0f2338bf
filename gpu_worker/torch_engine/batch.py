"""From a plan to the tensors of one step: one flat list of tokens, `[decode rows | prefill chunks]`."""

import dataclasses

import torch
from torch import Tensor

from gpu_worker.torch_engine.attention import BLOCKS_PER_TILE, KV_TILE, AttentionGroup
from gpu_worker.torch_engine.config import BLOCK_TOKENS
from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK
from gpu_worker.torch_engine.model_config import ModelConfig
from gpu_worker.torch_engine.scheduler import Plan, Work

SPAN = 128  # query tokens of one attention group of a prefill chunk

Span = tuple[Work, int, int]  # work, start, count


@dataclasses.dataclass(frozen=True)
class Batch:
    work: tuple[Work, ...]  # in the order of the rows
    tokens: Tensor  # (rows,) int64
    positions: Tensor  # (rows,) int64
    slots: Tensor  # (rows,) where each row's keys and values go
    groups: tuple[AttentionGroup, ...]
    last_rows: Tensor  # (len(work),) the last row of each piece of work; sampled from if the work samples


def build_batch(plan: Plan, *, config: ModelConfig, row_multiple: int, device: torch.device) -> Batch:
    """Decode rows of like length become one attention group each; of a prefill chunk every SPAN tokens are one."""
    by_tiles: dict[int, list[Work]] = {}
    for work in plan.decode:
        by_tiles.setdefault(round_tiles(tiles_for(work.start + 1)), []).append(work)
    members = [(tiles, [(work, work.start, 1) for work in group]) for tiles, group in sorted(by_tiles.items())]
    members += [
        (tiles_for(start + count), [(work, start, count)]) for work in plan.prefill for start, count in spans(work)
    ]
    order = tuple(work for _, group in sorted(by_tiles.items()) for work in group) + plan.prefill

    groups, row = [], 0
    for tiles, group in members:
        groups.append(_group(group, tiles, row, config, row_multiple, device))
        row += groups[-1].sequences * groups[-1].per_sequence
    positions = [position for work in order for position in range(work.start, work.start + work.count)]
    tokens = [token for work in order for token in work.sequence.tokens[work.start : work.start + work.count]]
    slots = [
        work.sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        for work in order
        for position in range(work.start, work.start + work.count)
    ]
    ends, at = [], -1
    for work in order:
        at += work.count
        ends.append(at)
    return Batch(
        work=order,
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        groups=tuple(groups),
        last_rows=torch.tensor(ends, device=device),
    )


def tiles_for(length: int) -> int:
    return -(-length // KV_TILE)


def round_tiles(tiles: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ...: few groups, and no row is padded to more than half again its length."""
    if tiles <= 4:
        return tiles
    power = 1 << (tiles.bit_length() - 1)
    return power if tiles == power else power * 3 // 2 if tiles <= power * 3 // 2 else power * 2


def spans(work: Work) -> list[tuple[int, int]]:
    """(start, count) of each piece of a chunk: scores stay small, and early pieces look at fewer keys."""
    end = work.start + work.count
    return [(start, min(SPAN, end - start)) for start in range(work.start, end, SPAN)]


def _group(
    group: list[Span], tiles: int, first_row: int, config: ModelConfig, row_multiple: int, device: torch.device
) -> AttentionGroup:
    per_sequence = group[0][2]
    width = tiles * BLOCKS_PER_TILE
    table: list[int] = []
    for work, _, _ in group:
        owned = work.sequence.blocks[:width]
        table += owned + [NULL_BLOCK] * (width - len(owned))
    starts = torch.tensor([start for _, start, _ in group], device=device)
    mask = causal_mask(starts, per_sequence, tiles, config.group, row_multiple)
    return AttentionGroup(
        sequences=len(group),
        per_sequence=per_sequence,
        tiles=tiles,
        query_rows=query_rows(first_row, len(group), per_sequence, tiles, mask.shape[2], config, device),
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
