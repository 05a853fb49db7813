"""Products with weights in int4 and int8: every layout of groups, and the models that hold such weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.layers.mxfp4_linear
import kernels.layers.quantized_linear
import kernels.native.quantized
from kernels.layers.integer_linear import integer_linear
from kernels.layers.linear import linear
from kernels.layers.quantized import QuantizedWeight, dequantize_weight, pack_nibbles, quantize_weight
from kernels.layers.quantized_linear import pack_quantized_weight
from tests.helpers.paged import run_seqs
from tests.helpers.stored_models import awq, write_stored
from tests.helpers.tiny_models import MAX_MODEL_LEN, make_tiny_model
from workers.collectives import SoloGroup
from workers.models.loading import load_model


def weight_of(
    num_bits: int, shape: tuple[int, int], group_size: int, device: torch.device, *, has_zeros: bool = False
) -> QuantizedWeight:
    """Any codes, scales and zero points."""
    generator = torch.Generator().manual_seed(shape[1])
    limit = 2 ** (num_bits - 1)
    codes = torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)
    groups = (shape[0], -(-shape[1] // group_size))
    zeros = torch.randint(-limit, limit, groups, generator=generator).float() if has_zeros else None
    weight = QuantizedWeight(
        "int8" if num_bits == 8 else "int4",
        codes if num_bits == 8 else pack_nibbles(codes),
        torch.exp2(torch.randint(-8, 0, groups, generator=generator).float()) * 1.3,
        torch.Size(shape),
        group_size,
        zeros,
    )
    return weight.to(device)


def assert_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
    """Sums in fp32, whose error grows with the magnitude of the terms, and one rounding of the result."""
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[x.dtype]
    dense = dequantize_weight(weight).double()
    expected = x.double() @ dense.t() + (0 if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    zero = 0 if weight.zeros is None else weight.zeros.abs().max().item()
    terms = dense.abs() + weight.scales.max().item() * zero
    magnitude = x.double().abs() @ terms.t()
    assert ((found.double() - expected).abs() <= rounding * expected.abs() + 4e-6 * magnitude + 1e-6).all()


def rows(num_rows: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each launch of the kernel."""
    seen: list[int] = []

    def watched(x: Tensor, *arguments: object, **options: int) -> Tensor:
        seen.append(len(x))
        return integer_linear(x, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.layers.quantized_linear, "integer_linear", watched)
    return seen


@pytest.mark.parametrize(
    ("num_bits", "shape", "group_size", "has_zeros", "num_rows"),
    [
        (4, (1, 1), 1, True, 1),
        (4, (20, 96), 32, True, 0),
        (4, (20, 96), 32, True, 3),
        (4, (20, 160), 128, False, 2),
        (8, (70, 33), 33, False, 17),
        (8, (20, 48), 16, True, 3),
    ],
)
def test_the_product(
    num_bits: int,
    shape: tuple[int, int],
    group_size: int,
    has_zeros: bool,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    launches: list[int],
) -> None:
    weight = weight_of(num_bits, shape, group_size, device, has_zeros=has_zeros)
    bias = torch.randn(shape[0]).to(device, dtype)
    assert_product(rows(num_rows, shape[1], dtype, device), weight, bias)
    assert launches == [num_rows]


def test_what_the_kernel_is_not_made_for_is_right_too(device: torch.device, launches: list[int]) -> None:
    assert_product(rows(65, 32, torch.float32, device), weight_of(4, (20, 32), 32, device))
    assert_product(rows(3, 72, torch.float32, device), weight_of(4, (20, 72), 24, device))
    assert launches == []


def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    weight = weight_of(4, (20, 64), 32, device)
    wide = torch.full((10, 200), torch.nan, dtype=dtype, device=device)
    wide[::2, 10:138] = torch.randn(5, 128).to(device, dtype)
    assert_product(wide[::2, 10:74], weight)
    assert_product(wide[::2, 10:138:2], weight)


def test_a_bad_row_or_group_affects_no_other(dtype: torch.dtype, device: torch.device) -> None:
    weight = weight_of(4, (20, 128), 32, device)
    x = rows(5, 128, dtype, device)
    expected = linear(x, weight)
    scales = weight.scales.clone()
    scales[3, 2] = torch.nan
    x[1, 7] = torch.nan
    found = linear(x, replace(weight, scales=scales))
    assert found[1].isnan().all()
    assert found[:, 3].isnan().all()
    features = [feature for feature in range(20) if feature != 3]
    assert torch.equal(found[[0, 2, 3, 4]][:, features], expected[[0, 2, 3, 4]][:, features])


def test_more_splits_change_rounding_only(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.layers.mxfp4_linear, "MIN_SPLIT_FEATURES", 128)
    assert_product(rows(3, 640, dtype, device), weight_of(4, (20, 640), 128, device))


def test_arguments_that_do_not_fit_are_named(device: torch.device) -> None:
    weight = weight_of(4, (20, 64), 32, device)
    x = rows(2, 64, torch.float32, device)
    for changes, name in (({"codes": weight.codes[:, 1:]}, "codes"), ({"scales": weight.scales[:, :1]}, "scales")):
        wrong = {"codes": weight.codes, "scales": weight.scales} | changes
        with pytest.raises(ValueError, match=name):
            integer_linear(x, wrong["codes"], wrong["scales"], None, None, num_bits=4, group_size=32)


def logits(folder: Path, device: torch.device, **options: object) -> list[Tensor]:
    common = {"dtype": torch.float32, "device": device, "group": SoloGroup(), "max_model_len": MAX_MODEL_LEN}
    model = load_model(folder, **common, **options)  # type: ignore[arg-type]
    return run_seqs(model, [[1, 2, 3]], "whole")


def test_a_rounded_model_computes_what_its_weights_say(
    tmp_path: Path, device: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama", tmp_path / "tiny", intermediate_size=96, head_dim=32, num_hidden_layers=1)
    ours = logits(tiny.folder, device, quantization="int4")
    assert launches
    monkeypatch.setattr(kernels.layers.quantized_linear, "runs_triton", lambda x: False)
    monkeypatch.setattr(kernels.native.quantized, "can_round_inputs", lambda: False)
    for found, expected in zip(ours, logits(tiny.folder, device, quantization="int4"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_quantised_target_keeps_its_bits(tmp_path: Path, device: torch.device, launches: list[int]) -> None:
    tiny = make_tiny_model("llama", tmp_path / "tiny", intermediate_size=96, head_dim=32, num_hidden_layers=1)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    write_stored(tmp_path, tiny.folder, settings, awq)
    kept = logits(tmp_path / "stored", device, keeps_bits=True)
    assert launches
    for found, expected in zip(kept, logits(tmp_path / "dense", device), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_packing_leaves_a_weight_as_the_kernel_reads_it(device: torch.device) -> None:
    weight = quantize_weight(torch.randn(8, 64, device=device), "int4")
    assert pack_quantized_weight(weight) is weight
