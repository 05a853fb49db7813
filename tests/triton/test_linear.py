"""The kernel of the row-invariant product: it is right, and a row's bits are the same whatever else is computed."""

import pytest
import torch
from torch import Tensor

import kernels.layers.linear
from kernels.layers.linear import SPLIT_FEATURES, linear_batch_invariant, probe_linear_batch_invariant


def inputs(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    x = torch.randn(num_rows, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Sums in fp32, whose error grows with the magnitude of the terms, and one rounding of the result."""
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[x.dtype]
    added = 0 if bias is None else bias.double()
    expected = x.double() @ weight.double().t() + added
    magnitude = x.double().abs() @ weight.double().abs().t()
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= rounding * expected.abs() + 4e-6 * magnitude + 1e-7).all()


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 3), (100, 96), (256, 64), (40, SPLIT_FEATURES), (130, SPLIT_FEATURES + 1), (9, 2500)]
)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 65])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_is_the_product(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, with_bias: bool, device: torch.device
) -> None:
    x, weight, bias = inputs(num_rows, shape, dtype, device)
    chosen = bias if with_bias else None
    assert_product(linear_batch_invariant(x, weight, chosen), x, weight, chosen)


def test_leading_dimensions_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = inputs(60, (20, 48), dtype, device)
    y = linear_batch_invariant(x[:, 8:40].view(3, 20, 32), weight[:, 8:40], bias)
    assert_product(y.view(60, 20), x[:, 8:40], weight[:, 8:40], bias)
    assert_product(linear_batch_invariant(x[:, ::2], weight[:, ::2]), x[:, ::2], weight[:, ::2], None)


@pytest.mark.parametrize("shape", [(50, 96), (20, 2 * SPLIT_FEATURES + 70)])
def test_a_row_does_not_depend_on_its_batch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = inputs(140, shape, dtype, device)
    whole = linear_batch_invariant(x, weight, bias)
    parts = [(0, 1), (0, 140), (64, 1), (64, 9), (64, 65), (128, 1)]  # each row in its place within a tile
    if device.type == "cuda":  # numpy, which multiplies for the interpreter, rounds by place
        parts += [(139, 1), (70, 1), (3, 5), (60, 9), (13, 64), (75, 65)]
    for start, num_rows in parts:
        part = slice(start, start + num_rows)
        assert torch.equal(linear_batch_invariant(x[part], weight, bias), whole[part]), f"{num_rows} rows"


def test_sums_computed_apart_have_the_same_bits(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = inputs(5, (150, 2 * SPLIT_FEATURES + 70), dtype, device)
    apart = linear_batch_invariant(x, weight, bias)
    monkeypatch.setattr(kernels.layers.linear, "ENOUGH_TILES", 0)
    assert torch.equal(linear_batch_invariant(x, weight, bias), apart)


def test_other_rows_have_no_influence(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, _ = inputs(5, (24, 64), dtype, device)
    expected = linear_batch_invariant(x, weight)
    x[2] = torch.nan
    y = linear_batch_invariant(x, weight)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_the_probe_finds_nothing(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("numpy, which multiplies for the interpreter, rounds a row by its place in the tile")
    _, weight, bias = inputs(1, (32, SPLIT_FEATURES + 32), dtype, device)
    assert probe_linear_batch_invariant(weight, bias) is None
