"""The reference of quantised KV blocks: its error, layout and edge cases, and what the launchers refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv import kv_quant
from kernels.kv.kv_quant import QuantisedBlocks, dequantise_blocks, quantise_blocks
from tests.helpers.compile_sm90 import compile_for_sm90

SHAPE = (3, 2, 2, 5, 2, 12)  # num_blocks, num_layers, keys and values, block_size, num_kv_heads, head_dim


def read(quantised: QuantisedBlocks, like: Tensor, bits: int) -> Tensor:
    out = torch.full_like(like, torch.nan)
    dequantise_blocks(quantised, out, bits=bits)
    return out


def steps_of(kv: Tensor) -> Tensor:
    """The fp64 step of every element, from the group to which the definition assigns it."""
    k, v = kv.double().unbind(-4)
    k_range = (k.max(dim=-3, keepdim=True).values - k.min(dim=-3, keepdim=True).values).expand_as(k)
    v_range = (v.max(dim=-1, keepdim=True).values - v.min(dim=-1, keepdim=True).values).expand_as(v)
    return torch.stack([k_range, v_range], dim=-4) / 255


@settings(deadline=None, max_examples=40)
@given(exponent=st.integers(-60, 100), offset=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 1000))
def test_errors_are_within_half_a_step_and_eight_steps(exponent: int, offset: float, seed: int) -> None:
    """Values go far beyond the range of fp16, where such scales would overflow."""
    torch.manual_seed(seed)
    kv = ((torch.randn(SHAPE) + offset) * 2.0**exponent).bfloat16().float()
    quantised, steps = quantise_blocks(kv), steps_of(kv)
    rounding = 2.0**-21 * (kv.abs().double() + 255 * steps)  # fp32; near zero, as at the ends of the range
    assert ((read(quantised, kv, 8) - kv).abs() <= steps / 2 + rounding).all()
    assert ((read(quantised, kv, 4) - kv).abs() <= steps * 8 + rounding).all()


def test_four_bits_are_as_good_as_a_quantiser_of_four_bits() -> None:
    kv = torch.randn(SHAPE)
    step_of_four_bits = steps_of(kv) * 255 / 15
    assert ((read(quantise_blocks(kv), kv, 4) - kv).abs() <= step_of_four_bits / 2).all()


def test_all_256_codes_come_back() -> None:
    """A channel of keys and a token of values whose numbers equal their codes."""
    codes = torch.arange(256.0)
    kv = torch.zeros(2, 256, 1, 256)
    kv[0] = codes.view(256, 1, 1)
    kv[1] = codes.view(1, 1, 256)
    quantised = quantise_blocks(kv)
    assert quantised.lower is not None
    assert torch.equal(read(quantised, kv, 8), kv)
    assert torch.equal(read(quantised, kv, 4), (kv / 16).floor() * 16 + 7.5)
    assert quantised.k_scales[0].eq(0).all()
    assert quantised.k_scales[1].eq(1).all()


def test_the_layout_is_as_described() -> None:
    """Channels head_dim / 2 apart share a byte, the first in its lower half; planes hold the nibbles of one code."""
    kv = torch.zeros(2, 1, 1, 4)
    kv[1, 0, 0] = torch.tensor([0.0, 0x5A, 0xC3, 255])
    quantised = quantise_blocks(kv)
    assert quantised.lower is not None
    assert quantised.upper[1, 0, 0].tolist() == [0xC0, 0xF5]
    assert quantised.lower[1, 0, 0].tolist() == [0x30, 0xFA]
    assert quantised.v_scales[:, 0, 0].tolist() == [0.0, 1.0]


def test_the_upper_plane_is_enough_for_four_bits() -> None:
    kv = torch.randn(SHAPE)
    quantised = quantise_blocks(kv)
    upper_alone = replace(quantised, lower=None)
    assert torch.equal(read(upper_alone, kv, 4), read(quantised, kv, 4))
    with pytest.raises(ValueError, match="bits: expected 4, or 8 where both planes were kept"):
        read(upper_alone, kv, 8)


@pytest.mark.parametrize("value", [0.0, -1.5, 3e38, 1e-40])
@pytest.mark.parametrize("bits", [4, 8])
def test_equal_elements_come_back_exactly(value: float, bits: int) -> None:
    kv = torch.full(SHAPE, value)
    assert torch.equal(read(quantise_blocks(kv), kv, bits), kv)


def test_a_range_smaller_than_a_step_counts_as_zero() -> None:
    kv = torch.full(SHAPE, 1e-40)
    kv[..., ::2] = 2e-40
    assert (read(quantise_blocks(kv), kv, 8) - kv).abs().max() <= 1.01e-40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_once_to_the_dtype_of_the_cache(dtype: torch.dtype) -> None:
    kv = torch.randn(SHAPE).to(dtype)
    quantised = quantise_blocks(kv)
    assert torch.equal(read(quantised, kv, 8), read(quantised, kv.float(), 8).to(dtype))


def test_no_blocks_means_no_work() -> None:
    kv = torch.empty(0, 2, 2, 16, 2, 64)
    assert read(quantise_blocks(kv), kv, 8).shape == kv.shape


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kv: expected contiguous floating"):
        quantise_blocks(torch.zeros(2, 4, 2, 7))
    with pytest.raises(ValueError, match="kv: expected contiguous floating"):
        quantise_blocks(torch.zeros(2, 4, 2, 8, dtype=torch.int32))
    kv = torch.zeros(SHAPE)
    quantised = quantise_blocks(kv)
    with pytest.raises(ValueError, match=r"quantised.upper: expected .* \[2, 2, 2, 5, 2, 6\]"):
        dequantise_blocks(quantised, kv[:2])
    with pytest.raises(ValueError, match=r"quantised.k_scales: expected contiguous torch.float32"):
        dequantise_blocks(replace(quantised, k_scales=quantised.k_scales.half()), kv)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_sm_90(dtype: str) -> None:
    pointers = {"upper_ptr": "*u8", "lower_ptr": "*u8", "k_scales_ptr": "*fp32", "v_scales_ptr": "*fp32"}
    tile: dict[str, object] = {"BLOCK_SIZE": 16, "HALF_DIM": 64, "TOKENS": 16, "CHANNELS": 64}
    types = {**pointers, "num_kv_heads": "i32"}
    compile_for_sm90(kv_quant.quantise_kernel, {"kv_ptr": f"*{dtype}", **types}, tile, enable_fp_fusion=False)
    for bits in (4, 8):
        compile_for_sm90(
            kv_quant.dequantise_kernel,
            {"out_ptr": f"*{dtype}", **types},
            {"BITS": bits, **tile},
            enable_fp_fusion=False,
        )
