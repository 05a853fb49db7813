"""The kernels that write and read KV caches in FP8 give the results of the references."""

import pytest
import torch

from kernels.attention.paged_attention import paged_attention, paged_attention_reference
from kernels.dispatch import INTERPRETED
from kernels.kv.fp8 import KVScales, from_fp8, to_fp8
from kernels.kv.reshape_and_cache import gather_rotary_reference, reshape_and_cache, reshape_and_cache_reference

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}
# The length of each seq and its new tokens: few for the split kernel, many for the other.
SEQS = {"decode": [(70, 1), (20, 3), (1, 1)], "prefill": [(90, 70)]}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("kind", SEQS)
def test_attention(kind: str, batch_invariant: bool, dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor(SEQS[kind], dtype=torch.int32)
    num_blocks = -(-lengths[:, 0] // BLOCK_SIZE)
    sizes = torch.tensor([0.02, 30.0])[:, None]
    k, v = torch.randn(2, int(num_blocks.sum()) + 1, BLOCK_SIZE, 2, 64) * sizes
    scales = KVScales.of(k.to(device), v.to(device))
    caches = [to_fp8(k.to(device), scales.k), to_fp8(v.to(device), scales.v)]
    for cache in caches:
        cache[-1] = 0x7F
    ends = num_blocks.cumsum(0)
    table = torch.full((len(lengths), 6), len(k) - 1, dtype=torch.int32)
    for row, (end, count) in enumerate(zip(ends.tolist(), num_blocks.tolist(), strict=True)):
        table[row, :count] = torch.arange(end - count, end).flip(0)
    new = lengths[:, 1].cumsum(0, dtype=torch.int32)
    q = torch.randn(int(new[-1]), 4, 64).to(device, dtype)
    arguments = {
        "block_table": table.to(device),
        "seq_lens": lengths[:, 0].contiguous().to(device),
        "cu_seqlens_q": torch.cat([new.new_zeros(1), new]).to(device),
        "softmax_scale": 0.1,
    }
    found = paged_attention(q, *caches, **arguments, kv_scales=scales, batch_invariant=batch_invariant)
    exact = [from_fp8(cache, scale, dtype) for cache, scale in zip(caches, (scales.k, scales.v), strict=True)]
    expected, _ = paged_attention_reference(q, *exact, **arguments)
    size = expected.float().abs().amax((0, 2), keepdim=True)  # of each head
    assert ((found.float() - expected.float()).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("rotary_dim", [48, 32])
def test_the_write(rotary_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Numbers beyond the range and NaN among them."""
    q, k, v = (torch.randn(9, heads, 48).to(device, dtype) for heads in (4, 2, 2))
    v[3, 1, :3] = torch.tensor([1e4, -1e4, torch.nan])
    rotary = gather_rotary_reference(torch.randn(20, rotary_dim, device=device), torch.arange(9, device=device))
    slots = torch.tensor([3, 40, -1, 17, 0, 4, 5, 6, 20], device=device)
    scales = KVScales(torch.tensor([2.0**-7, 2.0**-8], device=device), torch.tensor([2.0**-6, 2.0**-8], device=device))
    found, expected = ([torch.zeros(3, 16, 2, 48, dtype=torch.uint8, device=device) for _ in "kv"] for _ in range(2))
    reshape_and_cache(q.clone(), k, v, rotary, slots, *found, scales)
    reshape_and_cache_reference(q.clone(), k, v, rotary, slots, *expected, scales)
    for cache, right in zip(found, expected, strict=True):
        counts = torch.ones_like(right, dtype=torch.bool)
        if INTERPRETED:  # it cuts subnormal numbers, changes NaN, rounds 1.98 to 1, and ties away from zero
            counts = ((right & 0x78) != 0) & ((right & 7) != 0) & ((right & 0x7F) != 0x7F)
        difference = cache[counts].int() - right[counts].int()
        assert difference.abs().max() <= int(INTERPRETED)
