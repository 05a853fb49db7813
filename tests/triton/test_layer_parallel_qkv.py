"""The kernel of norms and projections of several layers at once, compared with its reference."""

import pytest
import torch
from torch import Tensor

from kernels.layers.layer_parallel_qkv import layer_parallel_qkv, layer_parallel_qkv_reference

EPS = 1e-5
# Sums in another order; in 16 bits the norm, too, may round to a neighbour.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(
    num_layers: int, num_tokens: int, hidden: int, out: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hidden)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    weights = random(num_layers, out, hidden) * hidden**-0.5
    return random(num_tokens, hidden) * 3, random(num_layers, hidden), weights, random(num_layers, out)


@pytest.mark.parametrize("shape", [(1, 1, 8, 3), (4, 8, 96, 50), (2, 17, 300, 130), (3, 1, 640, 64), (2, 0, 64, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_is_the_reference(
    shape: tuple[int, int, int, int], with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, norms, weights, biases = inputs(*shape, dtype=dtype, device=device)
    chosen = biases if with_bias else None
    found = layer_parallel_qkv(x, norms, weights, chosen, EPS)
    expected = layer_parallel_qkv_reference(x, norms, weights, chosen, EPS)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    _, norms, weights, biases = inputs(2, 4, 64, 32, dtype=dtype, device=device)
    wide = torch.full((8, 200), torch.nan, dtype=dtype, device=device)
    wide[::2, 10:138] = torch.randn(4, 128).to(device, dtype)
    for x in (wide[::2, 10:74], wide[::2, 10:138:2]):
        found = layer_parallel_qkv(x, norms, weights, biases, EPS)
        expected = layer_parallel_qkv_reference(x, norms, weights, biases, EPS)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_bad_token_or_layer_affects_no_other(dtype: torch.dtype, device: torch.device) -> None:
    x, norms, weights, biases = inputs(3, 5, 96, 40, dtype=dtype, device=device)
    expected = layer_parallel_qkv(x, norms, weights, biases, EPS)
    x[2, 0] = torch.nan
    weights[1] = torch.nan
    found = layer_parallel_qkv(x, norms, weights, biases, EPS)
    assert found[:, 2].isnan().all()
    assert found[1].isnan().all()
    assert torch.equal(found[::2][:, [0, 1, 3, 4]], expected[::2][:, [0, 1, 3, 4]])
