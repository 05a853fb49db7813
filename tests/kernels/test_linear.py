"""Row-invariant products: they are right, have the same bits in every batch, and the probe notices if they do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.layers.linear
import kernels.layers.partial_sums
from kernels.layers.linear import (
    SPLIT_FEATURES,
    linear,
    linear_batch_invariant,
    linear_batch_invariant_reference,
    linear_kernel,
    pack_weight,
    probe_linear_batch_invariant,
    tile_options,
)
from kernels.layers.partial_sums import MERGE_ELEMENTS, add_partial_sums_kernel
from kernels.native.linear import NativeWeight, why_not
from tests.helpers.compile_sm90 import compile_for_sm90


def inputs(num_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    return torch.randn(num_rows, in_features).to(dtype), weight.to(dtype), torch.randn(out_features).to(dtype)


# fp32: a sum of in_features products; bf16: one rounding of the result.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (768, 256), (100, 1536)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 15, 16, 17, 257])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_is_the_product(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, tolerance: float, with_bias: bool
) -> None:
    x, weight, bias = inputs(num_rows, shape, dtype)
    expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    for operator in (linear_batch_invariant, linear_batch_invariant_reference):
        y = operator(x, weight, bias if with_bias else None)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_leading_dimensions_and_strides() -> None:
    x, weight, bias = inputs(60, (20, 48), torch.float32)
    expected = linear_batch_invariant(x[:, 8:40].contiguous(), weight[:, 8:40].contiguous(), bias)
    y = linear_batch_invariant(x[:, 8:40].view(3, 20, 32), weight[:, 8:40], bias)
    torch.testing.assert_close(y, expected.view(3, 20, 20), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(768, 256), (256, 688), (1536, 1536), (111, 4096)])
def test_a_row_does_not_depend_on_its_batch(
    shape: tuple[int, int], dtype: torch.dtype, num_threads: int, torch_threads: None
) -> None:
    torch.set_num_threads(num_threads)
    x, weight, bias = inputs(300, shape, dtype)
    if finding := probe_linear_batch_invariant(weight):
        pytest.skip(f"refused at load on this machine: {finding}")
    whole = linear_batch_invariant(x, weight, bias)
    for start, num_rows in ((0, 1), (299, 1), (43, 2), (7, 3), (100, 8), (283, 17), (1, 64), (45, 255), (44, 256)):
        part = slice(start, start + num_rows)
        assert torch.equal(linear_batch_invariant(x[part], weight, bias), whole[part]), f"{num_rows} rows"


def test_every_lone_row_keeps_its_bits() -> None:
    x, weight, _ = inputs(300, (512, 1536), torch.bfloat16)
    if finding := probe_linear_batch_invariant(weight):
        pytest.skip(f"refused at load on this machine: {finding}")
    alone = torch.cat([linear_batch_invariant(row, weight) for row in x.unsqueeze(1)])
    assert torch.equal(linear_batch_invariant(x, weight), alone)
    for end in range(257, 301):  # more rows than a tile holds: no row may come out like a lone one
        assert torch.equal(linear_batch_invariant(x[end - 257 : end], weight), alone[end - 257 : end])


def test_fp32_can_be_kept_here() -> None:
    _, weight, bias = inputs(1, (200, 1536), torch.float32)
    assert probe_linear_batch_invariant(weight, bias) is None


def test_the_probe_notices_a_product_that_depends_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_batch_invariant(rows, weight, bias) * (1.001 if rows.shape[0] == 17 else 1)

    monkeypatch.setattr(kernels.layers.linear, "linear_batch_invariant", careless)
    _, weight, _ = inputs(1, (24, 16), torch.float32)
    finding = probe_linear_batch_invariant(weight)
    assert finding is not None
    assert "17 rows" in finding
    assert "[24, 16]" in finding


class _Kernel:
    """Stands in for a kernel: it can be called with any grid."""

    def __init__(self, run: Callable[..., object]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return self._run


@pytest.mark.parametrize("shape", [(64, 1100), (1024, 2048), (5000, 1025)])
def test_the_probe_sees_sums_that_are_split_and_sums_that_are_not(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[bool] = []

    def launch(*tensors: Any, APART: bool, **_: object) -> None:
        splits.append(APART)
        tensors[3].zero_()

    monkeypatch.setattr(kernels.layers.linear, "runs_triton", lambda x: True)
    monkeypatch.setattr(kernels.layers.linear, "linear_kernel", _Kernel(launch))
    monkeypatch.setattr(
        kernels.layers.partial_sums, "add_partial_sums_kernel", _Kernel(lambda *tensors, **_: tensors[2].zero_())
    )
    assert probe_linear_batch_invariant(torch.empty(shape, dtype=torch.bfloat16)) is None
    assert not splits[0]
    assert all(splits[1:3])  # a lone row


def test_errors_name_the_argument() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"^weight: .*x \[2, 8\], got \[3, 7\]"):
        linear_batch_invariant(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"^weight: expected torch.float32 like x"):
        linear_batch_invariant(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"^bias: expected contiguous \[3\], got \[2\]"):
        linear_batch_invariant(x, weight, torch.zeros(2))
    with pytest.raises(ValueError, match=r"^bias: .*strides \[2\]"):
        linear_batch_invariant(x, weight, torch.zeros(6)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 33, 300])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 48), (96, 1), (1536, 520), (33, 17)])
def test_a_packed_weight_gives_the_same_product(
    dtype: torch.dtype, num_rows: int, in_features: int, out_features: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, 2 * in_features).to(dtype)[:, ::2]  # strided
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    packed = pack_weight(weight)
    expected = x.double() @ weight.double().T + bias.double()
    bound = {torch.bfloat16: 2**-8, torch.float32: 1e-5}[dtype]
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    error = linear(x, packed, bias).double() - expected
    assert error.shape == (num_rows, out_features)
    assert (error.abs() <= bound * magnitude).all()


def test_only_weights_that_gain_from_it_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    weight = torch.randn(32, 32)
    assert pack_weight(weight) is weight
    packed = pack_weight(weight.bfloat16())
    assert isinstance(packed, Tensor)
    assert packed.is_mkldnn == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_keep_the_promise_of_batch_invariance(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(300, (200, 1536), dtype)
    packed = pack_weight(weight, batch_invariant=True)
    assert isinstance(packed, NativeWeight)
    assert probe_linear_batch_invariant(packed, bias) is None
    y = linear_batch_invariant(x.view(3, 100, 1536), packed, bias)
    assert torch.equal(y[1, 7], linear_batch_invariant(x[107:108], packed, bias)[0])
    assert pack_weight(weight.half(), batch_invariant=True).dtype == torch.float16  # as it is: not compiled
    with pytest.raises(ValueError, match=r"^weight: expected \[out_features, in_features\]"):
        linear_batch_invariant(x[:, 1:], packed, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("apart", [False, True])
def test_the_kernel_compiles_for_sm_90(dtype: torch.dtype, apart: bool) -> None:
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    options = tile_options(dtype)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature = {"x_ptr": kind, "weight_ptr": kind, "out_ptr": "*fp32" if apart else kind, "num_rows": "i32"}
    signature |= dict.fromkeys(("out_features", "in_features", "x_stride", "weight_stride"), "i32:16")
    if not apart:
        signature["bias_ptr"] = kind
    constexprs = {"APART": apart, "SPLIT": SPLIT_FEATURES, **options, **({"bias_ptr": None} if apart else {})}
    compiled = compile_for_sm90(linear_kernel, signature, constexprs, **launch)
    assert ("wgmma" in compiled.asm["ptx"]) == (dtype != torch.float32)


def test_the_addition_of_partial_sums_compiles_for_sm_90() -> None:
    signature = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    signature |= {"num_splits": "i32", "num_elements": "i32", "out_features": "i32:16"}
    compile_for_sm90(add_partial_sums_kernel, signature, {"BLOCK": MERGE_ELEMENTS})
