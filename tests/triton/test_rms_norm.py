"""The RMSNorm kernel: right for any shape and stride, the same for a row in any batch, and it writes nothing else."""

import pytest
import torch
from torch import Tensor

from kernels.layers.rms_norm import fused_add_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-5
# The kernel and the reference round fp32 values that differ in their last bits: results are at most one unit apart.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1), (3, 7), (33, 128), (1, 4096), (5, 1000), (2, 8192), (7, 5, 96), (3, 2, 128), (0, 64), (96,)]


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 3).to(device, dtype)


def assert_normed(y: Tensor, x: Tensor, weight: Tensor) -> None:
    assert y.dtype == x.dtype
    expected = rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[x.dtype], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(*shape, dtype=dtype, device=device), random(shape[-1], dtype=dtype, device=device)
    before = x.clone()
    assert_normed(rms_norm(x, weight, EPS), x, weight)
    assert torch.equal(x, before)


def test_heads_of_a_fused_projection(dtype: torch.dtype, device: torch.device) -> None:
    fused = random(9, 8, 96, dtype=dtype, device=device)
    fused[:, 3] = torch.nan  # a head that is not asked for
    weight = random(96, dtype=dtype, device=device)
    for heads in (fused[:, :3], fused[:, 4:], fused[::2, 4:7], fused[:, 4:].transpose(0, 1)):
        y = rms_norm(heads, weight, EPS)
        assert y.is_contiguous()
        assert_normed(y, heads, weight)


def test_strided_features(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(40, 65, dtype=dtype, device=device), random(40, dtype=dtype, device=device)
    assert_normed(rms_norm(x.t(), weight, EPS), x.t(), weight)
    assert_normed(rms_norm(x[:, 1::2], weight[:32], EPS), x[:, 1::2], weight[:32])


@pytest.mark.parametrize("shape", [(1, 64), (17, 1000), (3, 4, 128), (2, 4096)])
def test_fused_add(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, residual = random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device) / 2
    weight = random(shape[-1], dtype=dtype, device=device)
    total, x_before = x + residual, x.clone()
    y, updated = fused_add_rms_norm(x, residual, weight, EPS)
    assert updated is residual
    assert torch.equal(residual, total)  # one rounding, as torch rounds it
    assert torch.equal(x, x_before)
    assert_normed(y, total, weight)
    assert torch.equal(y, rms_norm(total, weight, EPS))


def test_fused_add_into_rows_of_a_wider_tensor(dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((6, 200), torch.nan, dtype=dtype, device=device)
    wide[::2, 20:148] = random(3, 128, dtype=dtype, device=device)
    x, weight = random(3, 128, dtype=dtype, device=device), random(128, dtype=dtype, device=device)
    total = x + wide[::2, 20:148]
    y, _ = fused_add_rms_norm(x, wide[::2, 20:148], weight, EPS)
    assert_normed(y, total, weight)
    assert torch.equal(wide[::2, 20:148], total)
    assert wide[1::2].isnan().all()
    assert wide[:, :20].isnan().all()
    assert wide[:, 148:].isnan().all()


@pytest.mark.parametrize("hidden", [64, 128, 1000, 1536])
def test_a_row_does_not_depend_on_its_batch(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(70, hidden, dtype=dtype, device=device), random(hidden, dtype=dtype, device=device)
    whole = rms_norm(x, weight, EPS)
    added, _ = fused_add_rms_norm(x, x.clone(), weight, EPS)
    assert torch.equal(rms_norm(x.view(10, 7, hidden), weight, EPS).view(70, hidden), whole)
    for start, num_rows in [(0, 1), (69, 1), (3, 2), (5, 9), (13, 33)]:
        part = x[start : start + num_rows]
        assert torch.equal(rms_norm(part, weight, EPS), whole[start : start + num_rows])
        assert torch.equal(fused_add_rms_norm(part, part.clone(), weight, EPS)[0], added[start : start + num_rows])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_a_bad_row_affects_no_other(device: torch.device) -> None:
    x, weight = random(20, 64, dtype=torch.float32, device=device), random(64, dtype=torch.float32, device=device)
    expected = rms_norm(x, weight, EPS)
    x[7, 3] = torch.nan
    x[8, 3] = torch.inf
    y = rms_norm(x, weight, EPS)
    assert y[7].isnan().all()
    kept = [row for row in range(20) if row not in (7, 8)]
    assert torch.equal(y[kept], expected[kept])


def test_a_row_of_zeros_stays_zero(device: torch.device) -> None:
    assert not rms_norm(torch.zeros(2, 8, device=device), torch.ones(8, device=device), EPS).any()
