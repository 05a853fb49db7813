"""RoPE and the cache write, compared slot by slot with rotation of complex numbers in fp64."""

import pytest
import torch
from torch import Tensor

from kernels.kv.reshape_and_cache import (
    TILE_ELEMENTS,
    gather_rotary,
    gather_rotary_kernel,
    reshape_and_cache,
    reshape_and_cache_kernel,
    reshape_and_cache_reference,
)
from tests.helpers.compile_sm90 import compile_for_sm90

MAX_POSITION = 4096
# The result is rounded once; in fp32, the rounding of the table's cosines and sines counts too.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def angles(rotary_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(MAX_POSITION, dtype=torch.float64).unsqueeze(1) * frequencies


def cos_sin(rotary_dim: int) -> Tensor:
    return torch.cat([angles(rotary_dim).cos(), angles(rotary_dim).sin()], dim=1).float()


def rotated(x: Tensor, positions: Tensor, rotary_dim: int) -> Tensor:
    """Features i and i + rotary_dim / 2 are one complex number, multiplied by e^(i angle)."""
    pairs = torch.complex(*x[..., :rotary_dim].double().chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(()).double(), angles(rotary_dim)[positions]).unsqueeze(1)
    return torch.cat([turned.real, turned.imag, x[..., rotary_dim:].double()], dim=-1)


class Case:
    """Tokens from a fused projection, and a cache full of NaN."""

    def __init__(
        self,
        num_tokens: int,
        *,
        num_q_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        rotary_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(num_tokens)
        self.rotary_dim = rotary_dim or head_dim
        fused = torch.randn(num_tokens, num_q_heads + 2 * num_kv_heads, head_dim).to(dtype)
        self.q, self.k, self.v = fused.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
        self.positions = torch.randint(0, MAX_POSITION, (num_tokens,))
        self.rotary = gather_rotary(cos_sin(self.rotary_dim), self.positions)
        num_blocks, block_size = num_tokens // 8 + 2, 16
        self.slots = torch.randperm(num_blocks * block_size)[:num_tokens]
        self.k_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()

    def arguments(self) -> dict[str, Tensor]:
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "rotary": self.rotary,
            "slot_mapping": self.slots,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
        }


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("operator", [reshape_and_cache, reshape_and_cache_reference])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [
        (1, 1, 1, 2, 2),
        (3, 6, 2, 64, 64),
        (17, 4, 4, 96, 96),
        (300, 8, 1, 128, 128),
        (5, 3, 3, 80, 32),
        (0, 2, 2, 32, 32),
    ],
)
def test_keys_are_rotated_and_written(
    operator, dtype: torch.dtype, num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    case = Case(
        num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        dtype=dtype,
    )
    if num_tokens > 2:
        case.slots[1] = -1
    expected_q = rotated(case.q, case.positions, rotary_dim)
    expected_k = rotated(case.k, case.positions, rotary_dim)
    k, v = case.k.clone(), case.v.clone()
    operator(**case.arguments())

    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(case.q.double(), expected_q, **close)
    assert torch.equal(case.k, k)
    assert torch.equal(case.v, v)
    k_slots, v_slots = case.k_cache.flatten(0, 1), case.v_cache.flatten(0, 1)
    written = case.slots[case.slots >= 0]
    torch.testing.assert_close(k_slots[written].double(), expected_k[case.slots >= 0], **close)
    assert torch.equal(v_slots[written], v[case.slots >= 0])
    untouched = torch.ones(len(k_slots), dtype=torch.bool)
    untouched[written] = False
    assert k_slots[untouched].isnan().all()
    assert v_slots[untouched].isnan().all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_bits_of_the_reference_for_any_batch(dtype: torch.dtype) -> None:
    fast, slow = Case(300, dtype=dtype), Case(300, dtype=dtype)
    reshape_and_cache_reference(**slow.arguments())
    for start, end in [(0, 1), (1, 8), (8, 9), (9, 200), (200, 300)]:
        arguments = fast.arguments()
        for name in ("q", "k", "v", "slot_mapping"):
            arguments[name] = arguments[name][start:end]
        arguments["rotary"] = arguments["rotary"][:, start:end]
        reshape_and_cache(**arguments)
    assert torch.equal(fast.q, slow.q)
    assert torch.equal(fast.k_cache.nan_to_num(), slow.k_cache.nan_to_num())
    assert torch.equal(fast.v_cache.nan_to_num(), slow.v_cache.nan_to_num())


@pytest.mark.usefixtures("implementation")
def test_strided_features_are_rotated_too() -> None:
    case, strided = Case(5), Case(5)
    strided.q = case.q.clone().transpose(1, 2).contiguous().transpose(1, 2)
    strided.k = case.k.clone().transpose(1, 2).contiguous().transpose(1, 2)
    assert strided.q.stride(-1) != 1
    reshape_and_cache(**case.arguments())
    reshape_and_cache(**strided.arguments())
    assert torch.equal(strided.q, case.q)
    assert torch.equal(strided.k_cache.nan_to_num(), case.k_cache.nan_to_num())


@pytest.mark.usefixtures("implementation")
def test_all_slots_may_be_skipped() -> None:
    case = Case(4)
    case.slots.fill_(-1)
    reshape_and_cache(**case.arguments())
    assert case.k_cache.isnan().all()
    assert case.v_cache.isnan().all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"^q: expected \[num_tokens, num_q_heads, head_dim\], got \[6, 64\]"),
        ("k", lambda x: x[:3], r"^k: expected \[4, 2, 64\].*got \[3, 2, 64\]"),
        ("v", lambda x: x[:, :1], r"^v: expected \[4, 2, 64\].*got \[4, 1, 64\]"),
        ("v", lambda x: x.bfloat16(), r"^v: expected torch.float32 like q, got torch.bfloat16"),
        ("slot_mapping", lambda x: x[:2], r"^slot_mapping: expected int64 \[4\], got torch.int64 \[2\]"),
        ("rotary", lambda x: x.bfloat16(), r"^rotary: expected fp32"),
        ("rotary", lambda x: x.repeat(1, 1, 1, 2), r"^rotary: .*at most 64.*got torch.float32 \[2, 4, 1, 128\]"),
        ("rotary", lambda x: x[..., ::2], r"^rotary: .*strides"),
        ("rotary", lambda x: x[:, :3], r"^rotary: expected fp32 \[2, 4, 1,.*got torch.float32 \[2, 3, 1, 64\]"),
        ("k_cache", lambda x: x.transpose(1, 2), r"^k_cache: expected contiguous"),
        ("v_cache", lambda x: x[1:], r"^v_cache: expected contiguous"),
        ("v_cache", lambda x: x.bfloat16(), r"^v_cache: expected torch.float32 like q"),
    ],
)
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    arguments = Case(4).arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        reshape_and_cache(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions", lambda x: x.int(), r"^positions: expected int64 \[num_tokens\], got torch.int32"),
        ("cos_sin_cache", lambda x: x.bfloat16(), r"^cos_sin_cache: expected fp32"),
        ("cos_sin_cache", lambda x: x[:, ::2], r"^cos_sin_cache: expected contiguous rows, got strides \[64, 2\]"),
        ("cos_sin_cache", lambda x: x[:, :7], r"^cos_sin_cache: .*even.*\[4096, 7\]"),
    ],
)
def test_errors_of_the_gather_name_the_argument(name: str, change, message: str) -> None:
    arguments = {"cos_sin_cache": cos_sin(64), "positions": torch.arange(4)}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        gather_rotary(**arguments)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("*bf16", "*bf16"), ("*fp16", "*fp16"), ("*fp32", "*fp32"), ("*bf16", "*fp8e4nv")],
    ids=["bf16", "fp16", "fp32", "fp8"],
)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (96, 96), (80, 32)])
def test_the_kernel_compiles_for_sm_90_into_wide_accesses(
    head_dim: int, rotary_dim: int, kind: str, cache: str
) -> None:
    block_half = {128: 64, 96: 64, 32: 16}[rotary_dim]
    signature = {f"{name}_ptr": kind for name in ("q", "k", "v")}
    signature |= {f"{name}_cache_ptr": cache for name in "kv"}
    signature |= {"rotary_ptr": "*fp32", "slot_ptr": "*i64", "num_tokens": "i32"}
    signature |= {f"{name}_stride_{level}": "i32:16" for name in "qkv" for level in ("token", "head")}
    signature |= {f"rotary_stride_{level}": "i32:16" for level in ("sin", "token")}
    constexprs = {"q_stride": 1, "k_stride": 1, "v_stride": 1, "slot_stride": 1, "NUM_Q_HEADS": 32, "NUM_KV_HEADS": 8}
    constexprs |= {"HEAD_DIM": head_dim, "HALF": rotary_dim // 2, "ROWS": TILE_ELEMENTS // block_half}
    constexprs |= {"BLOCK_HALF": block_half, "BLOCK_REST": 64 if head_dim > rotary_dim else 0}
    scales = ("k_scales_ptr", "v_scales_ptr")
    signature |= dict.fromkeys(scales, "*fp32") if cache == "*fp8e4nv" else {}
    constexprs |= {} if cache == "*fp8e4nv" else dict.fromkeys(scales)
    compiled = compile_for_sm90(reshape_and_cache_kernel, signature, constexprs)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]


def test_the_gather_compiles_for_sm_90() -> None:
    signature = {"cache_ptr": "*fp32", "position_ptr": "*i64", "out_ptr": "*fp32", "cache_stride": "i32:16"}
    constexprs = {"position_stride": 1, "HALF": 64, "BLOCK": 64}
    compile_for_sm90(gather_rotary_kernel, {**signature, "num_tokens": "i32"}, constexprs, num_warps=1)
