"""The slow, obvious form of torch's `varlen_attn` over paged keys and values, which holds callers to its rules."""

import torch
from torch import Tensor

from gpu_worker.torch_engine.attention import reference_attend


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """Rules: as torch.nn.attention.varlen documents them, and as FlashAttention 2 checks them (flash_api.cpp)."""
    check_metadata(query, key, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k, block_table)
    counts = (cu_seq_q[1:] - cu_seq_q[:-1]).tolist()
    assert window_size == ((-1, 0) if max(counts) > 1 else (-1, -1)), "one row sees all, more see up to themselves"
    assert num_splits == 1 or (max_q == 1 and enable_gqa), "split results of packed queries land in wrong rows"
    results = []
    for n, count in enumerate(counts):
        length = int(seqused_k[n])
        keys, values = (part[block_table[n].long()].flatten(0, 1)[:length] for part in (key, value))
        own = query[int(cu_seq_q[n]) : int(cu_seq_q[n + 1])] * scale
        results.append(reference_attend(own, keys, values, torch.arange(length - count, length, device=query.device)))
    return torch.cat(results).view_as(query)


def check_metadata(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> None:
    sequences = block_table.shape[0]
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert all(t.is_contiguous() for t in (cu_seq_q, cu_seq_k, seqused_k))
    assert block_table.stride(-1) == query.stride(-1) == key.stride(-1) == 1
    assert cu_seq_q.shape == cu_seq_k.shape == (sequences + 1,)
    assert seqused_k.shape == (sequences,)
    assert key.shape[1] % 256 == 0, "pages"
    assert enable_gqa == (query.shape[1] > key.shape[2])
    assert int(cu_seq_q[-1]) == query.shape[0]
    assert torch.equal(cu_seq_k[1:] - cu_seq_k[:-1], seqused_k)
    assert max_q >= int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert max_k >= int(seqused_k.max())
    assert bool((seqused_k > 0).all()), "a row that sees nothing has no result"
    assert bool((-(-seqused_k // key.shape[1]) <= block_table.shape[1]).all())
