"""The kernels of attention that reads shared prefixes once, compared with attention of each seq alone."""

import pytest
import torch

from kernels.attention.paged_attention import paged_attention_reference
from kernels.upcoming.prefix_groups import PrefixGroup
from kernels.upcoming.shared_prefix import plan_shared_prefix, shared_prefix_attention
from tests.helpers.shared_prefixes import BLOCK_SIZE, shared_batch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # two parts rounded, then their merge


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "num_new"),
    [(2, 4, 64, (1, 1, 1, 1)), (1, 8, 128, (1, 3, 2, 1)), (3, 1, 96, (5, 4, 1, 2)), (1, 1, 64, (30, 40, 2, 1))],
)
def test_reading_a_prefix_together_changes_nothing(
    num_kv_heads: int, group: int, head_dim: int, num_new: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    groups = [PrefixGroup(first_seq=0, num_seqs=3, num_blocks=9)]
    own_lens = [new + rest for new, rest in zip(num_new, (0, 3, 9, 5), strict=True)]
    batch = shared_batch(
        groups,
        own_lens,
        num_new,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    cache = batch.cache
    where = (cache.block_table, cache.seq_lens, batch.cu_seqlens_q)
    expected, _ = paged_attention_reference(batch.q, cache.k_cache, cache.v_cache, *where, softmax_scale=head_dim**-0.5)
    plan = plan_shared_prefix(groups, *where, num_blocks=len(cache.k_cache), block_size=BLOCK_SIZE)
    found = shared_prefix_attention(batch.q, cache.k_cache, cache.v_cache, plan, softmax_scale=head_dim**-0.5)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
