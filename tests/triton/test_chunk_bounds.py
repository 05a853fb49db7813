"""The kernels of bounds and scores, compared with their references."""

import pytest
import torch

from kernels.upcoming.chunk_bounds import chunk_bounds, chunk_bounds_reference, chunk_scores, chunk_scores_reference
from tests.helpers.poisoned_cache import poisoned_cache

LENS = [0, 1, 15, 16, 17, 70]


@pytest.mark.parametrize(
    ("chunk_size", "block_size", "group", "num_kv_heads", "head_dim"),
    [(16, 16, 1, 3, 64), (24, 16, 4, 2, 96), (5, 16, 8, 1, 128), (65, 5, 4, 2, 128), (128, 16, 8, 1, 96)],
)
def test_bounds_and_scores(
    chunk_size: int,
    block_size: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    cache = poisoned_cache(
        LENS, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device
    )
    args = (cache.k_cache, cache.block_table, cache.seq_lens)
    bounds = chunk_bounds(*args, chunk_size=chunk_size)
    assert torch.equal(bounds, chunk_bounds_reference(*args, chunk_size=chunk_size))

    fused = torch.randn(len(LENS), (group + 2) * num_kv_heads, head_dim, dtype=dtype, device=device)
    q = fused[:, : group * num_kv_heads]  # strided seqs, as in a slice of a fused projection
    scores = chunk_scores(q, bounds, cache.seq_lens, chunk_size=chunk_size)
    expected = chunk_scores_reference(q, bounds, cache.seq_lens, chunk_size=chunk_size)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)  # sums of head_dim terms in another order
    assert (bounds_hold(q, cache.keys, scores, chunk_size)).all()


def bounds_hold(q: torch.Tensor, keys: list[torch.Tensor], scores: torch.Tensor, chunk_size: int) -> torch.Tensor:
    held = []
    for seq, seq_keys in enumerate(keys):
        group = q.shape[1] // seq_keys.shape[1]
        exact = torch.einsum("hd,khd->hk", q[seq].double(), seq_keys.double().repeat_interleave(group, dim=1))
        chunks = torch.arange(len(seq_keys), device=q.device) // chunk_size
        bounds = scores[seq].double().repeat_interleave(group, dim=0)[:, chunks]
        held.append((bounds >= exact).flatten())
    return torch.cat(held)


def test_no_seq(device: torch.device) -> None:
    k_cache = torch.zeros(4, 16, 2, 64, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    bounds = chunk_bounds(k_cache, none.view(0, 3), none, chunk_size=16)
    assert bounds.shape == (0, 3, 2, 2, 64)
    assert chunk_scores(torch.zeros(0, 4, 64, device=device), bounds, none, chunk_size=16).shape == (0, 2, 3)
