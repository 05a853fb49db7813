"""Weights in 8 and 4 bits: how they are rounded, and that products with them are right on every path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.layers.linear import linear, linear_batch_invariant, probe_linear_batch_invariant
from kernels.layers.quantized import (
    QuantizedWeight,
    WeightFormat,
    dequantize_weight,
    pack_nibbles,
    quantize_weight,
    round_weight_reference,
)
from kernels.layers.quantized_linear import pack_quantized_weight, quantized_linear, quantized_linear_reference
from kernels.native.quantized import NativeQuantizedWeight, native_quantized_linear, why_not
from kernels.native.rounding import round_weight

FORMATS: list[WeightFormat] = ["int8", "int4", "mxfp4"]
SHAPES = {
    "int8": [(1, 1), (17, 33), (300, 1537), (1024, 512)],
    "int4": [(1, 1), (17, 33), (130, 257), (300, 1537), (1024, 512)],  # also with a last group that is shorter
    "mxfp4": [(1, 32), (17, 96), (1024, 512)],
}
needs_compiler = pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")


def inputs(num_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    weight *= torch.exp2(torch.arange(shape[0]) % 7).unsqueeze(1)  # outputs need scales of their own
    x, bias = (torch.randn(size, generator=generator) for size in ((num_rows, shape[1]), shape[:1]))
    return x.to(dtype), weight, bias.to(dtype)


@pytest.mark.parametrize(("format", "lowest", "group"), [("int8", 128, 300), ("int4", 8, 128)])
def test_codes_are_the_nearest_of_their_group(format: WeightFormat, lowest: int, group: int) -> None:
    _, weight, _ = inputs(1, (20, 300), torch.float32)
    rounded = dequantize_weight(quantize_weight(weight, format))
    for start in range(0, 300, group):
        part = slice(start, start + group)
        largest = weight[:, part].abs().amax(dim=1, keepdim=True)
        error = (rounded[:, part] - weight[:, part]).abs()
        assert (error <= largest / lowest * (0.5 + 1e-5)).float().mean() > 0.97  # all but a few that are clamped
        assert (error <= largest / (lowest - 1)).all()
        assert error.square().mean() > (largest / lowest).square().mean() / 30  # the steps are as long as they may be


@pytest.mark.parametrize("extreme", [-8, -7, 7])
def test_weights_that_were_rounded_before_are_found_again(extreme: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-6, 7, (16, 256), generator=generator).float()
    codes[:, [5, 200]] = extreme
    weight = codes * torch.rand(16, 1, generator=generator)
    torch.testing.assert_close(dequantize_weight(quantize_weight(weight, "int4")), weight, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_bits", "shape", "group"), [(4, (70, 300), 128), (8, (70, 33), 33), (4, (3, 5), 128)])
def test_compiled_rounding_is_as_good_as_the_reference(
    num_bits: int, shape: tuple[int, int], group: int, dtype: torch.dtype
) -> None:
    _, weight, _ = inputs(1, shape, torch.float32)
    weight = weight.to(dtype)
    weight[0], weight[1, 2], weight[2, -1] = 0.0, torch.nan, torch.inf
    wide = torch.cat([weight, weight], dim=1)[:, : shape[1]]  # rows that are strided
    codes, scales = round_weight(wide, num_bits, group)
    expected_codes, expected_scales = round_weight_reference(weight, num_bits, group)
    is_same = torch.isclose(scales, expected_scales, rtol=1e-6, atol=0, equal_nan=True)
    assert is_same.float().mean() > 0.95  # two scales may leave nearly the same error
    same = is_same.repeat_interleave(group, dim=1)[:, : shape[1]]
    assert torch.equal(codes[same & weight.isfinite()], expected_codes[same & weight.isfinite()])
    assert (codes[0] == 0).all()
    assert scales[1:3].isnan().any(dim=1).all()


def test_ties_go_to_the_even_code_and_zeros_stay() -> None:
    whole = [-8.0, 7.0, 3.0, 4.0, 5.0, -6.0]  # fixes the scale
    weight = torch.tensor([[*whole, 0.5], [*whole, 1.5], [*whole, -2.5], [0.0] * 7])
    expected = torch.tensor([[*whole, 0.0], [*whole, 2.0], [*whole, -2.0], [0.0] * 7])
    assert torch.equal(dequantize_weight(quantize_weight(weight, "int4")), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_weights_are_not_hidden(format: WeightFormat) -> None:
    weight = torch.ones(2, 64)
    weight[0, 3] = torch.nan
    y = quantized_linear(torch.ones(1, 64), pack_quantized_weight(quantize_weight(weight, format)))
    assert y[0, 0].isnan()
    assert y[0, 1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_result_is_the_product(format: WeightFormat, dtype: torch.dtype, implementation: str) -> None:
    for shape in SHAPES[format]:
        rows, weight, bias = inputs(130, shape, dtype)
        quantized = quantize_weight(weight, format)
        packed = pack_quantized_weight(quantized)
        assert isinstance(packed, NativeQuantizedWeight) == (implementation == "compiled")
        dense = dequantize_weight(quantized).double()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # weights of many rows are rounded too
        for num_rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 130):
            x = rows[:num_rows]
            y = linear(x, packed, bias if num_rows % 2 else None)
            assert y.dtype == dtype
            expected = x.double() @ dense.T + (bias.double() if num_rows % 2 else 0)
            scale = x.double().abs() @ dense.abs().T + 1
            assert ((y.double() - expected).abs() <= tolerance * scale).all(), (shape, num_rows)


def test_the_reference_is_the_product_with_dequantised_weights() -> None:
    x, weight, bias = inputs(3, (20, 200), torch.float32)
    quantized = quantize_weight(weight, "int4")
    expected = x.double() @ dequantize_weight(quantized).double().T + bias.double()
    torch.testing.assert_close(quantized_linear_reference(x, quantized, bias).double(), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_few_rows_depend_only_on_themselves(format: WeightFormat, dtype: torch.dtype, torch_threads: None) -> None:
    x, weight, bias = inputs(40, (250, 1024), dtype)
    packed = pack_quantized_weight(quantize_weight(weight, format))
    assert isinstance(packed, NativeQuantizedWeight)
    torch.set_num_threads(1)
    whole = torch.cat([native_quantized_linear(row.unsqueeze(0), packed, bias) for row in x])
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for start, num_rows in ((0, 1), (39, 1), (4, 2), (7, 3), (11, 5), (20, 8), (3, 9), (13, 16)):
            rows = slice(start, start + num_rows)
            assert torch.equal(quantized_linear(x[rows], packed, bias), whole[rows]), (num_rows, num_threads)


def stored(shape: tuple[int, int], num_bits: int, group_size: int, *, zeros: bool) -> QuantizedWeight:
    """As a checkpoint may hold it: groups of any size, zero points."""
    generator = torch.Generator().manual_seed(0)
    lowest, num_groups = 2 ** (num_bits - 1), -(-shape[1] // group_size)
    codes = torch.randint(-lowest, lowest, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(shape[0], num_groups, generator=generator) + 0.1
    points = torch.randint(-lowest, lowest, scales.shape, generator=generator).float() if zeros else None
    kept = codes if num_bits == 8 else pack_nibbles(codes)
    return QuantizedWeight("int8" if num_bits == 8 else "int4", kept, scales, torch.Size(shape), group_size, points)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("num_bits", "shape", "group"), [(4, (70, 256), 32), (8, (33, 192), 64), (8, (100, 300), 300)])
def test_groups_and_zero_points_of_checkpoints(
    num_bits: int, shape: tuple[int, int], group: int, zeros: bool, dtype: torch.dtype
) -> None:
    weight = stored(shape, num_bits, group, zeros=zeros)
    dense = dequantize_weight(weight).double()
    x = inputs(300, shape, dtype)[0]
    scale = x.double().abs() @ dense.abs().T + 1
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for batch_invariant in (False, True):
        packed = pack_quantized_weight(weight, batch_invariant=batch_invariant)
        for num_rows in (1, 7, 16, 17, 300):
            y = quantized_linear(x[:num_rows], packed)
            error = (y.double() - x[:num_rows].double() @ dense.T).abs()
            assert (error <= tolerance * scale[:num_rows]).all(), (num_rows, batch_invariant)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_their_bits_in_any_batch_if_they_must(dtype: torch.dtype, torch_threads: None) -> None:
    weight = stored((130, 256), 4, 64, zeros=True)
    packed = pack_quantized_weight(weight, batch_invariant=True)
    x = inputs(600, (130, 256), dtype)[0]
    whole = linear_batch_invariant(x, packed)
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        for rows in (slice(0, 1), slice(5, 22), slice(255, 257), slice(300, 600)):
            assert torch.equal(linear_batch_invariant(x[rows], packed), whole[rows])
    assert probe_linear_batch_invariant(packed, dtype=dtype) is None
    careless = pack_quantized_weight(weight)
    assert not torch.equal(linear(x, careless)[:1], linear(x[:1], careless)) or dtype == torch.float32


@needs_compiler
def test_strided_rows() -> None:
    x, weight, _ = inputs(9, (40, 32), torch.float32)
    packed = pack_quantized_weight(quantize_weight(weight, "int4"))
    wide = torch.cat([torch.full((9, 8), torch.nan), x, torch.full((9, 8), torch.nan)], dim=1)
    assert torch.equal(quantized_linear(wide[:, 8:40], packed), quantized_linear(x, packed))
    assert torch.equal(quantized_linear(x.T.contiguous().T, packed), quantized_linear(x, packed))


@pytest.mark.parametrize("pack", [pack_quantized_weight, lambda weight: weight])
def test_it_is_refused_where_rows_must_not_depend_on_the_batch(
    pack: Callable[[QuantizedWeight], QuantizedWeight],
) -> None:
    x, weight, _ = inputs(2, (8, 64), torch.float32)
    with pytest.raises(ValueError, match="weight: expected a dense one"):
        linear_batch_invariant(x, pack(quantize_weight(weight, "int4")))
