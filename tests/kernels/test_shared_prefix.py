"""Attention that reads shared prefixes once, compared with dense attention of each seq in fp64."""

import pytest
import torch
from torch import Tensor

from kernels.upcoming.prefix_groups import PrefixGroup
from kernels.upcoming.shared_prefix import plan_shared_prefix, shared_prefix_attention
from tests.helpers.shared_prefixes import BLOCK_SIZE, SharedBatch, shared_batch

SCALE = 0.3
BATCHES = {
    "one group, decode": ([PrefixGroup(first_seq=0, num_seqs=3, num_blocks=2)], [1, 4, 6], [1, 1, 1]),
    "own part is new tokens alone": ([PrefixGroup(first_seq=0, num_seqs=2, num_blocks=3)], [5, 1], [5, 1]),
    "others around": ([PrefixGroup(first_seq=1, num_seqs=2, num_blocks=1)], [9, 2, 5, 4], [3, 1, 2, 4]),
    "two groups and a silent seq": (
        [PrefixGroup(first_seq=0, num_seqs=2, num_blocks=5), PrefixGroup(first_seq=3, num_seqs=2, num_blocks=1)],
        [3, 8, 7, 4, 5],
        [1, 0, 7, 2, 3],
    ),
    "more query tokens than a chunk": ([PrefixGroup(first_seq=0, num_seqs=3, num_blocks=2)], [70, 2, 3], [66, 1, 2]),
}


def dense(batch: SharedBatch) -> Tensor:
    """Attention in fp64, one query token at a time."""
    cache, bounds = batch.cache, batch.cu_seqlens_q.tolist()
    group = batch.q.shape[1] // cache.k_cache.shape[2]
    rows = []
    for seq, seq_len in enumerate(cache.seq_lens.tolist()):
        num_new = bounds[seq + 1] - bounds[seq]
        blocks = cache.block_table[seq].long()
        k, v = (
            x[blocks].flatten(0, 1)[:seq_len].double().repeat_interleave(group, dim=1)
            for x in (cache.k_cache, cache.v_cache)
        )
        for new in range(num_new):
            visible = seq_len - num_new + new + 1
            scores = torch.einsum("hd,khd->hk", batch.q[bounds[seq] + new].double(), k[:visible]) * SCALE
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[:visible]))
    return torch.stack(rows)


def attend(batch: SharedBatch, groups: list[PrefixGroup]) -> Tensor:
    cache = batch.cache
    plan = plan_shared_prefix(
        groups,
        cache.block_table,
        cache.seq_lens,
        batch.cu_seqlens_q,
        num_blocks=len(cache.k_cache),
        block_size=BLOCK_SIZE,
    )
    return shared_prefix_attention(batch.q, cache.k_cache, cache.v_cache, plan, softmax_scale=SCALE)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("group", [1, 4])
def test_reading_a_prefix_together_changes_nothing(name: str, group: int) -> None:
    groups, own_lens, num_new = BATCHES[name]
    batch = shared_batch(groups, own_lens, num_new, group=group)
    torch.testing.assert_close(attend(batch, groups).double(), dense(batch), rtol=1e-5, atol=1e-5)


def test_impossible_groups_are_named() -> None:
    groups = [PrefixGroup(first_seq=0, num_seqs=2, num_blocks=2)]
    batch = shared_batch(groups, [3, 4], [1, 1])
    with pytest.raises(ValueError, match="groups: expected at least one"):
        attend(batch, [])
    with pytest.raises(ValueError, match="hold no new token"):
        attend(batch, [PrefixGroup(first_seq=0, num_seqs=2, num_blocks=3)])
    with pytest.raises(ValueError, match="runs of 2 seqs in their order"):
        attend(batch, [PrefixGroup(first_seq=1, num_seqs=2, num_blocks=1)])
    with pytest.raises(ValueError, match="runs of 2 seqs in their order"):
        attend(batch, [*groups, *groups])
    silent = shared_batch(groups, [3, 4], [0, 0])
    with pytest.raises(ValueError, match="expected query tokens in each"):
        attend(silent, groups)
