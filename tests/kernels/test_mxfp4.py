"""MXFP4 on CPU: the format compared with fp64, rounding at the borders, the product, and what is refused."""

import pytest
import torch
from torch import Tensor

from kernels.layers.mxfp4 import dequantize_mxfp4, quantize_kernel, quantize_mxfp4
from kernels.layers.mxfp4_linear import mxfp4_linear, mxfp4_linear_kernel, mxfp4_linear_reference, tile_options
from tests.helpers.compile_sm90 import compile_for_sm90

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float64)
# Magnitudes in units of the scale, and what they become: ties go to the even code; then either side of each border.
BORDERS = [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]


def every_code_and_scale() -> tuple[Tensor, Tensor]:
    """256 rows: row X holds all 16 codes twice, with scale byte X."""
    packed = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)] * 2, dtype=torch.uint8)
    return packed.repeat(256, 1), torch.arange(256, dtype=torch.uint8).unsqueeze(1)


def oracle(packed: Tensor, scales: Tensor) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    factors = torch.pow(2.0, scales.double() - 127)
    factors[scales == 255] = torch.nan
    return VALUES[codes] * factors.repeat_interleave(32, dim=1)


def weights(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    magnitudes = torch.exp2(torch.randint(-20, 4, (out_features, 1)).float())
    return (torch.randn(out_features, in_features) * magnitudes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_with_every_scale(dtype: torch.dtype) -> None:
    packed, scales = every_code_and_scale()
    expected = oracle(packed, scales).to(dtype)
    torch.testing.assert_close(dequantize_mxfp4(packed, scales, dtype), expected, rtol=0, atol=0, equal_nan=True)


def test_every_representable_weight_is_kept() -> None:
    packed, scales = every_code_and_scale()
    representable = dequantize_mxfp4(packed, scales).isfinite().all(dim=1)
    packed, scales = packed[representable], scales[representable]
    again = quantize_mxfp4(dequantize_mxfp4(packed, scales))
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scales)


@pytest.mark.parametrize("exponent", [-126, -60, 0, 100])
def test_ties_go_to_the_even_code(exponent: int) -> None:
    unit = 2.0**exponent
    for tie, expected in BORDERS:
        below, above = sorted(sorted(MAGNITUDES, key=lambda value: abs(value - tie))[:2])
        block = torch.zeros(1, 32)
        block[0, 0] = 4 * unit  # fixes the scale
        block[0, 1], block[0, 2] = tie * unit, -tie * unit
        block[0, 3], block[0, 4] = tie * (1 - 2**-20) * unit, tie * (1 + 2**-20) * unit
        found = dequantize_mxfp4(*quantize_mxfp4(block))[0, 1:5] / unit
        assert found.tolist() == [expected, -expected, below, above], tie


def test_the_block_maximum_sets_the_scale_and_saturates() -> None:
    for largest, scale, value in [
        (4.0, 127, 4.0),
        (5.9, 127, 6.0),
        (7.99, 127, 6.0),
        (8.0, 128, 8.0),
        (3.99, 126, 3.0),
    ]:
        packed, scales = quantize_mxfp4(torch.full((1, 32), largest))
        assert scales.tolist() == [[scale]], largest
        assert dequantize_mxfp4(packed, scales).unique().tolist() == [value]


def test_zeros_and_non_finite_weights() -> None:
    weight = torch.ones(5, 64)
    weight[0] = 0
    weight[1, 3], weight[2, 3], weight[3, 3] = torch.nan, torch.inf, -torch.inf
    weight[4, :32] = 2.0**-149  # as small as fp32 goes: below half a code of the least scale
    packed, scales = quantize_mxfp4(weight)
    assert scales[:, 0].tolist() == [0, 255, 255, 255, 0]
    assert scales[1:, 1].tolist() == [125] * 4
    found = dequantize_mxfp4(packed, scales)
    assert found[1:4, :32].isnan().all()
    assert torch.equal(found[1:4, 32:], weight[1:4, 32:])
    assert not found[0].any()
    assert not found[4, :32].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cast_is_the_nearest_weight_and_idempotent(dtype: torch.dtype) -> None:
    weight = weights(50, 320, dtype)
    packed, scales = quantize_mxfp4(weight[:, :320])
    found = dequantize_mxfp4(packed, scales)
    units = torch.pow(2.0, scales.double() - 127).repeat_interleave(32, dim=1)
    scaled = weight.double() / units
    assert scaled.abs().amax() < 8
    nearest = (scaled.unsqueeze(-1) - VALUES).abs().amin(dim=-1)
    torch.testing.assert_close((found.double() / units - scaled).abs(), nearest, rtol=0, atol=0)
    again = quantize_mxfp4(found)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scales)


def test_rows_may_be_strided() -> None:
    weight = weights(20, 96)
    for strided in (weight[:, 32:], weight[::2], weight.repeat_interleave(2, dim=1)[:, ::2]):
        for found, expected in zip(quantize_mxfp4(strided), quantize_mxfp4(strided.contiguous()), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "out_features", "in_features"), [(0, 8, 32), (1, 1, 32), (5, 300, 2080)])
def test_the_product(num_rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    packed, scales = quantize_mxfp4(weights(out_features, in_features))
    x = torch.randn(num_rows, in_features).to(dtype)
    dense = oracle(packed, scales)
    magnitude = x.double().abs() @ dense.abs().t()
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for product in (mxfp4_linear, mxfp4_linear_reference):
        found = product(x, packed, scales)
        assert found.dtype == dtype
        assert ((found.double() - x.double() @ dense.t()).abs() <= bound * magnitude + 1e-7).all()


def test_errors_name_the_argument() -> None:
    packed, scales = quantize_mxfp4(torch.zeros(4, 64))
    with pytest.raises(ValueError, match=r"^weight: .*multiple of 32, got \[4, 48\]"):
        quantize_mxfp4(torch.zeros(4, 48))
    with pytest.raises(ValueError, match=r"^weight: expected fp32, bf16 or fp16, got torch.float64"):
        quantize_mxfp4(torch.zeros(4, 64).double())
    with pytest.raises(ValueError, match=r"^scales: expected one byte for 16 of packed \[4, 32\], got \[4, 1\]"):
        dequantize_mxfp4(packed, scales[:, :1].contiguous())
    with pytest.raises(ValueError, match=r"^packed: expected a contiguous uint8 matrix, got torch.int8"):
        dequantize_mxfp4(packed.to(torch.int8), scales)
    with pytest.raises(ValueError, match=r"^x: expected \[num_rows, 64\] for packed, got \[2, 32\]"):
        mxfp4_linear(torch.zeros(2, 32), packed, scales)


@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_the_cast_compiles_for_sm_90(kind: str) -> None:
    signature = {"weight_ptr": kind, "packed_ptr": "*u8", "scale_ptr": "*u8", "num_blocks": "i32"}
    signature |= {"blocks_per_row": "i32:16", "row_stride": "i32:16"}
    compile_for_sm90(quantize_kernel, signature, {"TILE": 32})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 64])
def test_the_product_compiles_for_sm_90(dtype: torch.dtype, num_rows: int) -> None:
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    options = tile_options(dtype, num_rows, 4096)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature = {"x_ptr": kind, "packed_ptr": "*i32", "scale_ptr": "*u8", "sum_ptr": "*fp32", "num_rows": "i32"}
    signature |= dict.fromkeys(("out_features", "in_features", "x_stride", "split_features"), "i32:16")
    compiled = compile_for_sm90(mxfp4_linear_kernel, signature, options, **launch)
    if dtype != torch.float32:
        # Weights go from the loaded words to the tensor cores through registers: dense weights are never stored.
        staged_bytes = options["BLOCK_IN"] * (options["BLOCK_OUT"] // 2 + 2 * options["ROWS"])
        assert "mma.sync" in compiled.asm["ptx"]
        assert compiled.metadata.shared < launch["num_stages"] * staged_bytes
