"""Products of drafts, whose inputs are rounded to 8 bits like their weights (integers.cpp)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.layers.linear import linear
from kernels.layers.quantized import QuantizedWeight, WeightFormat, dequantize_weight, quantize_weight
from kernels.layers.quantized_linear import pack_quantized_weight, rounded_inputs_reference
from kernels.native import library, quantized
from kernels.native.library import cpu_options
from kernels.native.linear import why_not as native_why_not
from kernels.native.quantized import NativeQuantizedWeight, can_round_inputs, why_not

FORMATS: list[WeightFormat] = ["int8", "int4", "mxfp4"]
needs_compiler = pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")
needs_vnni = pytest.mark.skipif(
    why_not() is not None or not can_round_inputs(), reason="the CPU has no products of 8-bit numbers"
)


@pytest.mark.skipif(native_why_not() is not None, reason="nothing can be compiled here")
def test_what_was_compiled_here_is_right() -> None:
    assert why_not() is None  # otherwise the products are not used, and most tests are skipped


def make(shape: tuple[int, int], format: WeightFormat, dtype: torch.dtype) -> tuple[Tensor, QuantizedWeight, Tensor]:
    """16 rows of inputs, of which some are outliers, a weight, and a bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, shape[1], generator=generator)
    x[:, ::67] *= 10
    weight = torch.randn(shape, generator=generator) * torch.exp2(torch.arange(shape[0]) % 7).unsqueeze(1)
    return x.to(dtype), quantize_weight(weight, format), torch.randn(shape[0], generator=generator).to(dtype)


def packed(weight: QuantizedWeight) -> NativeQuantizedWeight:
    native = pack_quantized_weight(weight, rounds_inputs=True)
    assert isinstance(native, NativeQuantizedWeight)
    return native


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_result_is_bit_for_bit_the_definition(format: WeightFormat, dtype: torch.dtype) -> None:
    shapes = [(17, 32), (300, 1536), (130, 160), (64, 384)] + ([] if format == "mxfp4" else [(1, 1), (65, 257)])
    for shape in shapes:
        x, weight, bias = make(shape, format, dtype)
        expected = rounded_inputs_reference(x, weight, bias)
        assert torch.equal(linear(x, packed(weight), bias), expected), shape
        assert torch.equal(linear(x[:3], packed(weight), None), rounded_inputs_reference(x[:3], weight)), shape


@needs_vnni
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_inputs_costs_less_than_a_percent(format: WeightFormat) -> None:
    x, weight, _ = make((300, 1536), format, torch.float32)
    x = x.clamp(-3, 3)
    exact = x @ dequantize_weight(weight).T
    error = linear(x, packed(weight), None) - exact
    assert 0 < error.norm() < 0.01 * exact.norm()


@needs_vnni
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_depends_on_itself_alone(format: WeightFormat, torch_threads: None) -> None:
    x, weight, bias = make((1250, 1024), format, torch.bfloat16)
    native = packed(weight)
    whole = torch.cat([linear(row.unsqueeze(0), native, bias) for row in x])
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for num_rows in range(1, 17):
            rows = slice(16 - num_rows, 16)
            assert torch.equal(linear(x[rows], native, bias), whole[rows]), (num_rows, num_threads)


@needs_vnni
def test_inputs_that_are_not_numbers_are_not_hidden() -> None:
    x, weight, bias = make((40, 256), "int4", torch.bfloat16)
    x[0], x[1, 3], x[2, 200] = 0.0, torch.nan, -torch.inf
    y = linear(x, packed(weight), bias)
    assert torch.equal(y[0], bias)
    assert y[1:3].isnan().all()
    assert y[3:].isfinite().all()


@needs_compiler
def test_only_those_who_ask_for_it_get_rounded_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = make((40, 256), "int4", torch.float32)
    exact = pack_quantized_weight(weight)
    torch.testing.assert_close(linear(x, exact, None), x @ dequantize_weight(weight).T, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(quantized, "can_round_inputs", lambda: False)
    assert torch.equal(linear(x, packed(weight), None), linear(x, exact, None))


@needs_compiler
@pytest.mark.parametrize(("capability", "has_vnni", "rounds"), [("AVX2", True, False), ("AVX512", True, True)])
def test_a_cpu_without_such_products_multiplies_the_inputs_as_they_are(
    capability: str, has_vnni: bool, rounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, has_vnni=has_vnni)
    exact, built = tmp_path / "exact.cpp", tmp_path / "integers.so"
    names = [f"echelon_linear_codes{bits}_{dtype}" for bits in (4, 8) for dtype in ("float32", "bfloat16")]
    exact.write_text(
        "#include <cstdint>\n"
        + "".join(
            f'extern "C" void {name}(void*, void*, int64_t, int64_t, void*, int64_t, int64_t, void*, float* y)'
            + " { *y = 1; }\n"
            for name in names
        )
    )
    compiler = shutil.which("c++")
    assert compiler is not None
    source = Path(library.__file__).with_name("integers.cpp")
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", *cpu_options()]
    subprocess.run([compiler, *options, str(source), str(exact), "-o", str(built)], check=True)
    compiled = ctypes.CDLL(str(built))
    compiled.echelon_rounds_inputs.restype = ctypes.c_bool
    assert compiled.echelon_rounds_inputs() == rounds
    if not rounds:
        y, size = ctypes.c_float(), ctypes.c_int64
        multiply = compiled.echelon_linear_integers4_float32
        multiply(None, None, size(1), size(1), None, size(1), size(1), None, ctypes.byref(y))
        assert y.value == 1


@pytest.mark.parametrize("has_vnni", [False, True])
def test_the_library_is_compiled_for_what_the_cpu_has(has_vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "AVX512", has_vnni=has_vnni)
    assert ("-mavx512vnni" in cpu_options()) == has_vnni


def pretend(monkeypatch: pytest.MonkeyPatch, capability: str, *, has_vnni: bool) -> None:
    """That the CPU is another one, without bf16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
