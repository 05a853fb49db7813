"""Norms and projections of several layers at once, compared with fp64 and with one layer at a time."""

import pytest
import torch
from torch import Tensor

from kernels.layers.layer_parallel_qkv import (
    layer_parallel_qkv,
    layer_parallel_qkv_kernel,
    layer_parallel_qkv_reference,
    tile_options,
)
from tests.helpers.compile_sm90 import compile_for_sm90

EPS = 1e-5


def inputs(num_layers: int, num_tokens: int, hidden: int, out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, hidden) * 3
    norms, weights = torch.rand(num_layers, hidden) + 0.5, torch.randn(num_layers, out, hidden) * hidden**-0.5
    return tuple(t.to(dtype) for t in (x, norms, weights, torch.randn(num_layers, out)))


@pytest.mark.parametrize("operator", [layer_parallel_qkv, layer_parallel_qkv_reference])
# fp32: sums of `hidden` terms; 16 bits: the rounded norm and the rounded result.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 8, 3), (4, 8, 96, 50), (3, 17, 640, 64), (2, 0, 64, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_is_each_layers_norm_and_product(
    operator, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int, int], with_bias: bool
) -> None:
    x, norms, weights, biases = inputs(*shape, dtype)
    found = operator(x, norms, weights, biases if with_bias else None, EPS)
    x64 = x.double()
    normed = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = (normed * norms.double().unsqueeze(1)) @ weights.double().transpose(1, 2)
    if with_bias:
        expected += biases.double().unsqueeze(1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_bad_arguments_are_named() -> None:
    x, norms, weights, biases = inputs(2, 3, 16, 8, torch.float32)
    with pytest.raises(ValueError, match=r"^hidden_states: expected floating \[num_tokens, hidden\], got .*\[16\]"):
        layer_parallel_qkv(x[0], norms, weights, biases, EPS)
    with pytest.raises(ValueError, match=r"^qkv_weights: .*got \[8, 16\]"):
        layer_parallel_qkv(x, norms, weights[0], biases, EPS)
    with pytest.raises(ValueError, match=r"^qkv_weights: .*\[2, 8, 16\].*strides \[256, 32, 2\]"):
        layer_parallel_qkv(x, norms, weights.repeat_interleave(2, dim=2)[..., ::2], biases, EPS)
    with pytest.raises(ValueError, match=r"^norm_weights: .*\[2, 16\].*got \[1, 16\]"):
        layer_parallel_qkv(x, norms[:1], weights, biases, EPS)
    with pytest.raises(ValueError, match=r"^qkv_biases: .*torch.float32.*torch.bfloat16"):
        layer_parallel_qkv(x, norms, weights, biases.bfloat16(), EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_compiles_for_sm_90(dtype: torch.dtype) -> None:
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    options = tile_options(dtype)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature = {f"{name}_ptr": kind for name in ("x", "norm", "weight", "bias", "out")}
    signature |= {"num_tokens": "i32", "out_features": "i32:16", "x_stride": "i32:16", "eps": "fp32"}
    compiled = compile_for_sm90(layer_parallel_qkv_kernel, signature, {"HIDDEN": 4096, **options}, **launch)
    assert ("mma" in compiled.asm["ptx"]) == (dtype != torch.float32)
    assert "cp.async" in compiled.asm["ptx"]  # weights are loaded while others are multiplied
