"""The kernel of the SwiGLU gate, compared with its reference."""

import pytest
import torch
from torch import Tensor

from kernels.layers.silu_and_mul import silu_and_mul, silu_and_mul_reference

# One unit in the last place in 16-bit types; in fp32, a GPU's exponential is accurate to about 1e-6.
RTOL = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SIZES = [(1, 1), (3, 7), (2, 33), (40, 100), (1, 14336), (5, 2048), (3, 2049), (0, 16)]


def random(num_tokens: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(num_tokens, width, generator=generator) * 4).to(device, dtype)


def assert_gated(gate_up: Tensor) -> None:
    before = gate_up.clone()
    y = silu_and_mul(gate_up)
    assert y.is_contiguous()
    torch.testing.assert_close(y, silu_and_mul_reference(gate_up), rtol=RTOL[gate_up.dtype], atol=1e-6)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize(("num_tokens", "intermediate"), SIZES)
def test_the_result_is_the_reference(
    num_tokens: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_gated(random(num_tokens, 2 * intermediate, dtype=dtype, device=device))


def test_strides(dtype: torch.dtype, device: torch.device) -> None:
    wide = random(12, 40, dtype=dtype, device=device)
    for strided in (wide[:, 5:35], wide.t()[:12], wide[::2], wide[:, ::2]):
        assert_gated(strided)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's numpy
def test_large_gates_saturate(device: torch.device) -> None:
    gate_up = torch.tensor([[1e30, -1e30, 200.0, -200.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    expected = torch.tensor([[2e30, 0.0, 400.0, 0.0]], device=device)
    torch.testing.assert_close(silu_and_mul(gate_up), expected, rtol=1e-6, atol=1e-30)


def test_an_element_does_not_depend_on_its_place(dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(50, 2 * 33, dtype=dtype, device=device)
    whole = silu_and_mul(gate_up)
    for num_rows in (1, 7, 16):
        assert torch.equal(torch.cat([silu_and_mul(part) for part in gate_up.split(num_rows)]), whole)
    by_column = torch.stack([silu_and_mul(gate_up[:, [i, 33 + i]]).squeeze(1) for i in range(33)], dim=1)
    assert torch.equal(by_column, whole)
