"""The SwiGLU gate compared with fp64, and an element's bits, which do not depend on its place in the batch."""

import pytest
import torch
from torch import Tensor

from kernels.layers.silu_and_mul import TILE_ELEMENTS, silu_and_mul, silu_and_mul_kernel, silu_and_mul_reference
from tests.helpers.compile_sm90 import compile_for_sm90

# 16-bit types round silu(gate) and the product: two roundings of half an ulp each, and their cross term.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SIZES = [(1, 1), (3, 7), (2, 33), (5, 1000), (17, 688), (8, 4096), (0, 16)]


def inputs(num_tokens: int, intermediate: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(num_tokens, 2 * intermediate) * 4).to(dtype)


def exact(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half].double(), gate_up[:, half:].double()
    return gate * torch.sigmoid(gate) * up


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize(("num_tokens", "intermediate"), SIZES)
def test_launcher_and_reference_are_the_formula(num_tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    gate_up = inputs(num_tokens, intermediate, dtype)
    before = gate_up.clone()
    for operator in (silu_and_mul, silu_and_mul_reference):
        y = operator(gate_up)
        assert y.shape == (num_tokens, intermediate)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact(gate_up), rtol=RTOL[dtype], atol=1e-6)
    assert torch.equal(gate_up, before)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gates_saturate(dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[1e30, -1e30, 200.0, -200.0, 2.0, 2.0, 2.0, 2.0]], dtype=dtype)
    y = silu_and_mul(gate_up)
    assert torch.equal(y[0, :1], gate_up[0, :1] * 2)
    assert torch.equal(y[0, 1:], torch.tensor([0.0, 400.0, 0.0], dtype=dtype))


@pytest.mark.usefixtures("implementation")
def test_strides_do_not_matter() -> None:
    wide = inputs(12, 40, torch.float32)
    for strided in (wide[:, 5:71], wide.t()[:12].t(), wide[::2]):
        assert torch.equal(silu_and_mul(strided), silu_and_mul(strided.contiguous()))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("intermediate", [7, 33, 1000, 4096])
def test_a_row_does_not_depend_on_its_batch(
    intermediate: int, dtype: torch.dtype, num_threads: int, torch_threads: None
) -> None:
    torch.set_num_threads(num_threads)
    gate_up = inputs(70, intermediate, dtype)
    whole = silu_and_mul(gate_up)
    for num_rows in (1, 5, 16, 64):
        parts = torch.cat([silu_and_mul(part) for part in gate_up.split(num_rows)])
        assert torch.equal(parts, whole), f"{num_rows} rows at a time"


@pytest.mark.usefixtures("implementation")
def test_every_bfloat16_gate_has_the_same_bits_alone_and_in_a_vector() -> None:
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite()]
    gate_up = torch.stack([gates, torch.ones_like(gates)], dim=1)
    alone = silu_and_mul(gate_up)  # one element a row: the scalar tail
    vector = silu_and_mul(torch.cat([gates, torch.ones_like(gates)]).unsqueeze(0))
    assert torch.equal(alone.squeeze(1), vector.squeeze(0))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^gate_up: .*2 \* intermediate.*\[3, 7\]"):
        silu_and_mul(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"^gate_up: .*\[8\]"):
        silu_and_mul(torch.zeros(8))
    with pytest.raises(ValueError, match=r"^gate_up: expected a floating dtype"):
        silu_and_mul(torch.zeros(3, 8, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_the_kernel_compiles_for_sm_90_into_wide_accesses(kind: str) -> None:
    signature = {
        "gate_up_ptr": kind,
        "out_ptr": kind,
        "num_rows": "i32",
        "intermediate": "i32:16",
        "row_stride": "i32:16",
    }
    constexprs = {"column_stride": 1, "ROWS": 1, "BLOCK": TILE_ELEMENTS}
    compiled = compile_for_sm90(silu_and_mul_kernel, signature, constexprs)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]
