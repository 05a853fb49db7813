"""RMSNorm compared with fp64, and a row's bits, which do not depend on the batch around it."""

import pytest
import torch
from torch import Tensor

from kernels.layers.rms_norm import fused_add_rms_norm, rms_norm, rms_norm_kernel, rms_norm_reference, tile_shape
from tests.helpers.compile_sm90 import compile_for_sm90

EPS = 1e-5
# One rounding of the result to its dtype; fp32 has a few more before it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(shape) * 3).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    x64 = x.double()
    return x64 / ((x64**2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 256), (2, 1536), (4, 3, 128), (0, 64), (96,)])
def test_reference_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = inputs(shape, dtype)
    torch.testing.assert_close(
        rms_norm_reference(x, weight, EPS).double(), exact(x, weight), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10
    )


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 256), (17, 1536), (4, 3, 128), (0, 64)])
def test_launcher_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = inputs(shape, dtype)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(x, weight), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    x, weight = inputs((12, 160), dtype)
    rows, columns = x[:, 16:112], x.t()[:96].t()
    for strided in (rows, columns, x[::3, 10:106]):
        expected = rms_norm(strided.contiguous(), weight[:96], EPS)
        assert torch.equal(rms_norm(strided, weight[:96], EPS), expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 128, 256, 1000, 1536])
def test_a_row_does_not_depend_on_its_batch(
    hidden: int, dtype: torch.dtype, num_threads: int, torch_threads: None
) -> None:
    torch.set_num_threads(num_threads)
    x, weight = inputs((300, hidden), dtype)
    alone = torch.cat([rms_norm(row, weight, EPS) for row in x.unsqueeze(1)])
    for num_rows in (2, 3, 8, 17, 64, 300):
        assert torch.equal(rms_norm(x[-num_rows:], weight, EPS), alone[-num_rows:])
    assert torch.equal(rms_norm(x.view(100, 3, hidden), weight, EPS).view(300, hidden), alone)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_updates_the_residual(dtype: torch.dtype) -> None:
    x, weight = inputs((5, 96), dtype)
    residual = torch.randn(5, 96).to(dtype)
    total = x + residual
    x_before = x.clone()
    y, updated = fused_add_rms_norm(x, residual, weight, EPS)
    assert updated is residual
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    assert torch.equal(y, rms_norm(total, weight, EPS))


@pytest.mark.usefixtures("implementation")
def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))


def test_errors_name_the_argument() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"^weight: .*\[2, 8\].*\[7\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"^weight: expected contiguous torch.float32 like x"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"^weight: .*strides \[2\]"):
        rms_norm(x[:, :4], weight[::2], EPS)
    with pytest.raises(ValueError, match=r"^x: .*up to two leading dimensions.*\[1, 1, 2, 8\]"):
        rms_norm(x.view(1, 1, 2, 8), weight, EPS)
    with pytest.raises(ValueError, match=r"^x: expected a floating dtype"):
        rms_norm(x.int(), weight, EPS)
    with pytest.raises(ValueError, match=r"^residual: .*\[2, 8\].*\[1, 8\]"):
        fused_add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match=r"^residual: .*bfloat16"):
        fused_add_rms_norm(x, x.bfloat16(), weight, EPS)


@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize(("hidden", "with_residual"), [(128, False), (4096, True), (5120, True)])
def test_the_kernel_compiles_for_sm_90_into_wide_accesses(hidden: int, with_residual: bool, kind: str) -> None:
    rows, block, num_warps = tile_shape(hidden)
    strides = {f"{name}_stride_{level}": "i32:16" for name in ("x", "residual") for level in ("outer", "inner")}
    signature = {"x_ptr": kind, "weight_ptr": kind, "out_ptr": kind, "num_rows": "i32", "num_inner": "i32", **strides}
    constexprs: dict[str, object] = {
        "HIDDEN": hidden,
        "ROWS": rows,
        "BLOCK": block,
        "x_stride": 1,
        "residual_stride": 1,
    }
    if with_residual:
        signature["residual_ptr"] = kind
    else:
        constexprs["residual_ptr"] = None
    compiled = compile_for_sm90(rms_norm_kernel, {**signature, "eps": "fp32"}, constexprs, num_warps)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]
