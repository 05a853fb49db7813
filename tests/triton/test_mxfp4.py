"""The MXFP4 kernels: the cast, bit for bit, the decoding of every code and scale, and the product."""

import shutil
from pathlib import Path

import pytest
import torch
import triton
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton import language as tl

import kernels.layers.mxfp4_linear
from checkpoint.quantization import WeightFormat
from kernels.layers.linear import linear
from kernels.layers.mxfp4 import dequantize_mxfp4, quantize_mxfp4, quantize_mxfp4_reference
from kernels.layers.mxfp4_linear import block_factors, decode_words, mxfp4_linear
from kernels.layers.quantized import quantize_weight
from kernels.layers.quantized_linear import pack_quantized_weight, quantized_linear_reference
from tests.helpers.paged import run_seqs
from tests.helpers.tiny_models import MAX_MODEL_LEN, make_tiny_model
from workers.collectives import SoloGroup
from workers.models.loading import load_model


def weights(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(in_features)
    magnitudes = torch.exp2(torch.randint(-8, 4, (out_features, 1), generator=generator).float())
    return (torch.randn(out_features, in_features, generator=generator) * magnitudes).to(device, dtype)


def assert_same_cast(weight: Tensor) -> None:
    for found, expected in zip(quantize_mxfp4(weight), quantize_mxfp4_reference(weight), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (7, 96), (65, 256)])
def test_the_cast_has_the_bits_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    assert_same_cast(weights(*shape, dtype, device))


def test_the_cast_of_any_bits(device: torch.device) -> None:
    """fp32 numbers of all magnitudes, with subnormal numbers, infinities and NaN; borders and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (64, 256), generator=generator).int().view(torch.float32)
    assert_same_cast(anything.to(device))
    bits = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]).view(torch.int32)
    values = torch.cat([(bits + step).view(torch.float32) for step in (0, 1, -1)])[:31]
    block = torch.cat([torch.tensor([4.0]), values.nan_to_num(), torch.zeros(31 - len(values))])
    units = torch.exp2(torch.arange(-149, 126).float())
    assert_same_cast((units.unsqueeze(1) * block).to(device))
    assert_same_cast((units.unsqueeze(1) * -block).to(device))


def test_the_cast_of_strided_rows(dtype: torch.dtype, device: torch.device) -> None:
    weight = weights(20, 96, dtype, device)
    for strided in (weight[:, 32:], weight[::2], weight.repeat_interleave(2, dim=1)[:, ::2]):
        assert_same_cast(strided)


@triton.jit
def decode_kernel(word_ptr, scale_ptr, value_ptr, factor_ptr, code_dtype: tl.constexpr, dtype: tl.constexpr):
    values = decode_words(tl.load(word_ptr + tl.arange(0, 2)), code_dtype).to(tl.int16, bitcast=True)
    tl.store(value_ptr + tl.arange(0, 16), values.permute(0, 3, 1, 2).reshape(16))
    factors = block_factors(tl.load(scale_ptr + tl.arange(0, 256)), dtype)
    bits_dtype: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    tl.store(factor_ptr + tl.arange(0, 256), factors.to(bits_dtype, bitcast=True))


@pytest.mark.parametrize(
    ("code_dtype", "weight_dtype", "shift"),
    [
        (torch.float16, torch.float16, 14),
        (torch.float16, torch.float32, 14),
        (torch.bfloat16, torch.bfloat16, 126),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's numpy
def test_codes_and_factors_are_exact(
    code_dtype: torch.dtype, weight_dtype: torch.dtype, shift: int, device: torch.device
) -> None:
    """In bf16 too: the kernel returns bits, so the interpreter does no arithmetic in bf16."""
    of_triton = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    nibbles = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8, device=device)
    scales = torch.arange(256, device=device).to(torch.uint8)
    values = torch.empty(16, dtype=torch.int16, device=device)
    factors = torch.empty(256, dtype=torch.int32 if weight_dtype == torch.float32 else torch.int16, device=device)
    dtypes = {"code_dtype": of_triton[code_dtype], "dtype": of_triton[weight_dtype]}
    decode_kernel[(1,)](nibbles.view(torch.int32), scales, values, factors, **dtypes)
    ones = torch.full((1, 1), 127, dtype=torch.uint8, device=device)
    expected = dequantize_mxfp4(nibbles.repeat(1, 2), ones)[0, :16].double()
    assert torch.equal(values.view(code_dtype).double() * 2.0**shift, expected)
    expected = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 127).to(device)
    expected[255] = torch.nan
    torch.testing.assert_close(factors.view(weight_dtype), expected.to(weight_dtype), rtol=0, atol=0, equal_nan=True)


def assert_product(x: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Sums in fp32, whose error grows with the magnitude of the terms, and one rounding of the result."""
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[x.dtype]
    dense = dequantize_mxfp4(packed, scales).double()
    expected = x.double() @ dense.t()
    found = mxfp4_linear(x, packed, scales)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    magnitude = x.double().abs() @ dense.abs().t()
    assert ((found.double() - expected).abs() <= rounding * expected.abs() + 4e-6 * magnitude + 1e-7).all()


@pytest.mark.parametrize("num_rows", [0, 1, 17, 65])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 32), (130, 96), (65, 128)])
def test_the_product(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    assert_product(x, *quantize_mxfp4(weights(out_features, in_features, torch.float32, device)))


def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    packed, scales = quantize_mxfp4(weights(20, 64, torch.float32, device))
    wide = torch.full((10, 200), torch.nan, dtype=dtype, device=device)
    wide[::2, 10:138] = torch.randn(5, 128).to(device, dtype)
    assert_product(wide[::2, 10:74], packed, scales)
    assert_product(wide[::2, 10:138:2], packed, scales)


def test_a_bad_row_or_block_affects_no_other(dtype: torch.dtype, device: torch.device) -> None:
    packed, scales = quantize_mxfp4(weights(20, 128, torch.float32, device))
    x = torch.randn(5, 128).to(device, dtype)
    expected = mxfp4_linear(x, packed, scales)
    scales[3, 2] = 255
    x[1, 7] = torch.nan
    found = mxfp4_linear(x, packed, scales)
    assert found[1].isnan().all()
    assert found[:, 3].isnan().all()
    features = [feature for feature in range(20) if feature != 3]
    assert torch.equal(found[[0, 2, 3, 4]][:, features], expected[[0, 2, 3, 4]][:, features])


def test_more_splits_change_rounding_only(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, scales = quantize_mxfp4(weights(20, 640, torch.float32, device))
    x = torch.randn(3, 640).to(device, dtype)
    monkeypatch.setattr(kernels.layers.mxfp4_linear, "MIN_SPLIT_FEATURES", 128)
    assert_product(x, packed, scales)
    assert torch.equal(mxfp4_linear(x, packed, scales), mxfp4_linear(x, packed, scales))


def test_quantised_weights_in_mxfp4_take_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize_weight(weights(40, 64, torch.float32, device), "mxfp4")
    x, bias = torch.randn(3, 64, device=device), torch.randn(40, device=device)
    launches = []
    launch = kernels.layers.mxfp4_linear.mxfp4_linear_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid)
            return launch[grid]

    monkeypatch.setattr(kernels.layers.mxfp4_linear, "mxfp4_linear_kernel", Watched())
    packed = pack_quantized_weight(weight)
    torch.testing.assert_close(
        linear(x, packed, bias), quantized_linear_reference(x, weight, bias), rtol=1e-4, atol=1e-2
    )
    assert len(launches) == 1


def test_a_model_in_mxfp4_computes_what_its_rounded_weights_say(tmp_path: Path, device: torch.device) -> None:
    tiny = make_tiny_model("llama", tmp_path / "tiny", intermediate_size=96, head_dim=32)
    rounded = tmp_path / "rounded"
    shutil.copytree(tiny.folder, rounded)
    tensors = load_file(tiny.folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            tensors[name] = dequantize_mxfp4(*quantize_mxfp4_reference(tensor))
    save_file(tensors, rounded / "model.safetensors")

    def logits(folder: Path, quantization: WeightFormat | None) -> list[Tensor]:
        model = load_model(
            folder,
            dtype=torch.float32,
            device=device,
            group=SoloGroup(),
            max_model_len=MAX_MODEL_LEN,
            quantization=quantization,
        )
        return run_seqs(model, [[1, 2, 3], [7] * 5], "whole")

    for ours, theirs in zip(logits(tiny.folder, "mxfp4"), logits(rounded, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
