"""KV caches in FP8: what is written, and attention over it, on a CPU with and without compiled kernels."""

import pytest
import torch
from torch import Tensor

from kernels.attention import cpu as attention_cpu
from kernels.attention.paged_attention import paged_attention, paged_attention_reference
from kernels.kv.fp8 import KVScales, from_fp8, to_fp8
from kernels.kv.reshape_and_cache import gather_rotary_reference, reshape_and_cache, reshape_and_cache_reference

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, GROUP, HEAD_DIM = 9, 16, 2, 3, 48
SHAPE = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
TABLE = torch.tensor([[3, 1, 4, 0, 2], [8, 7, 999, -1, 5]], dtype=torch.int32)
SEQ_LENS = torch.tensor([70, 20], dtype=torch.int32)
CU_SEQLENS_Q = torch.tensor([0, 3, 4], dtype=torch.int32)


def random_caches() -> tuple[Tensor, Tensor, KVScales]:
    """In FP8, with heads of very different sizes. Blocks of no seq are NaN."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.03, 40.0])[:, None]
    k, v = torch.randn(2, *SHAPE, generator=generator) * sizes
    scales = KVScales.of(k, v)
    bits = [to_fp8(k, scales.k), to_fp8(v, scales.v)]
    for cache in bits:
        cache[6] = 0x7F
    return bits[0], bits[1], scales


def test_numbers_come_back_within_the_rounding_of_e4m3() -> None:
    x = torch.randn(50, 7, NUM_KV_HEADS, HEAD_DIM) * torch.tensor([1e-3, 300.0])[:, None]
    scales = KVScales.of(x, x).k
    assert torch.equal(scales, 2 ** scales.log2().round())
    back = from_fp8(to_fp8(x, scales), scales, torch.float32)
    least_normal = scales[:, None] * 2**-6
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, least_normal / 16)).all()
    assert torch.equal(back.bfloat16().float(), back), "no second rounding in bfloat16"


def test_values_beyond_those_seen_are_limited_and_nan_stays() -> None:
    x = torch.tensor([1.0, 1e6, -torch.inf, torch.nan]).view(4, 1, 1)
    back = from_fp8(to_fp8(x, torch.tensor([0.25])), torch.tensor([0.25]), torch.float32).flatten()
    assert back[:3].tolist() == [1.0, 112.0, -112.0]
    assert back[3].isnan()


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_fp8_is_attention_over_what_it_stands_for(
    dtype: torch.dtype, batch_invariant: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(attention_cpu, "can_attend", lambda call: False)
    k, v, scales = random_caches()
    q = torch.randn(4, NUM_KV_HEADS * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    lengths = {"block_table": TABLE, "seq_lens": SEQ_LENS, "cu_seqlens_q": CU_SEQLENS_Q, "softmax_scale": 0.1}
    found = paged_attention(q, k, v, **lengths, kv_scales=scales, batch_invariant=batch_invariant)
    exact = [from_fp8(cache, scale, dtype) for cache, scale in ((k, scales.k), (v, scales.v))]
    expected, _ = paged_attention_reference(q, *exact, **lengths)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    size = expected.float().abs().max()
    assert (found.float() - expected.float()).abs().max() < tolerance * size


def test_rotated_keys_and_values_are_written_as_fp8() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, HEAD_DIM, generator=generator).bfloat16() for heads in (4, 2, 2))
    rotary = gather_rotary_reference(torch.randn(9, HEAD_DIM, generator=generator), torch.arange(5))
    slots = torch.tensor([3, 40, -1, 17, 0])
    exact = [torch.zeros(SHAPE) for _ in range(2)]
    reshape_and_cache_reference(q.float(), k.float(), v.float(), rotary, slots, *exact)
    scales = KVScales.of(*exact)
    caches = [torch.zeros(SHAPE, dtype=torch.uint8) for _ in range(2)]
    rotated = q.clone()
    reshape_and_cache(rotated, k, v, rotary, slots, *caches, scales)
    assert not torch.equal(rotated, q)
    for cache, values, scale in zip(caches, exact, (scales.k, scales.v), strict=True):
        assert torch.equal(cache, to_fp8(values, scale))


def test_caches_that_are_no_fp8_are_refused() -> None:
    k, v, scales = random_caches()
    q = torch.randn(4, NUM_KV_HEADS * GROUP, HEAD_DIM)
    lengths = {"block_table": TABLE, "seq_lens": SEQ_LENS, "cu_seqlens_q": CU_SEQLENS_Q, "softmax_scale": 0.1}
    with pytest.raises(ValueError, match=r"k_cache: expected torch.float32 like q, got torch.uint8"):
        paged_attention(q, k, v, **lengths)
    with pytest.raises(ValueError, match=r"v_cache: expected torch.uint8 with kv_scales, got torch.float32"):
        paged_attention(q, k, v.float(), **lengths, kv_scales=scales)
