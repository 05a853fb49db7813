"""The kernels of RoPE and the cache write, compared with their references slot by slot."""

import pytest
import torch
from torch import Tensor

from kernels.kv.reshape_and_cache import (
    gather_rotary,
    gather_rotary_reference,
    reshape_and_cache,
    reshape_and_cache_reference,
)

MAX_POSITION = 512
BLOCK_SIZE = 16
# One unit in the last place: the kernel may fuse a multiply with an add.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
NAMES = ("q", "k", "v", "rotary", "slot_mapping", "k_cache", "v_cache")
# num_tokens, num_q_heads, num_kv_heads, head_dim, rotary_dim
SHAPES = [
    (1, 1, 1, 2, 2),
    (1, 32, 8, 128, 128),
    (3, 6, 2, 64, 64),
    (17, 4, 4, 96, 96),
    (40, 8, 1, 128, 128),
    (5, 3, 3, 80, 32),
    (2, 40, 5, 256, 64),
    (0, 2, 2, 32, 32),
]


class Case:
    """Slices of one fused projection with NaN in the gap beside them, and a cache full of NaN."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        num_tokens, num_q_heads, num_kv_heads, head_dim, rotary_dim = shape
        torch.manual_seed(num_tokens)
        sizes = [num_q_heads, num_kv_heads, num_kv_heads, 1]
        fused = torch.randn(num_tokens, sum(sizes), head_dim).to(device, dtype)
        fused[:, -1] = torch.nan
        self.fused = fused
        self.q, self.k, self.v, _ = fused.split(sizes, dim=1)
        table = torch.randn(MAX_POSITION, rotary_dim).to(device)
        self.rotary = gather_rotary_reference(table, torch.randint(0, MAX_POSITION, (num_tokens,)).to(device))
        num_blocks = num_tokens // 8 + 2
        self.slot_mapping = torch.randperm(num_blocks * BLOCK_SIZE)[:num_tokens].to(device)
        self.k_cache = torch.full((num_blocks, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan).to(device, dtype)
        self.v_cache = self.k_cache.clone()

    def arguments(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    def tokens(self, part: slice) -> dict[str, Tensor]:
        """The arguments for some of the tokens."""
        tokens = {name: x[part] for name, x in self.arguments().items()}
        return {**tokens, "rotary": self.rotary[:, part], "k_cache": self.k_cache, "v_cache": self.v_cache}


def assert_same(found: Case, expected: Case, tolerance: float) -> None:
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found.q, expected.q, **close)
    torch.testing.assert_close(found.k_cache, expected.k_cache, **close)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)
    assert found.fused[:, -1].isnan().all()
    torch.testing.assert_close(found.v_cache, expected.v_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    found, expected = Case(shape, dtype, device), Case(shape, dtype, device)
    for case in (found, expected):
        case.slot_mapping[1:2] = -1
    reshape_and_cache(**found.arguments())
    reshape_and_cache_reference(**expected.arguments())
    assert_same(found, expected, TOLERANCE[dtype])


def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype, device: torch.device) -> None:
    shape = (40, 6, 2, 64, 64)
    whole, parts = Case(shape, dtype, device), Case(shape, dtype, device)
    reshape_and_cache(**whole.arguments())
    for part in (slice(0, 1), slice(1, 8), slice(8, 9), slice(9, 40)):
        reshape_and_cache(**parts.tokens(part))
    assert_same(parts, whole, tolerance=0)


def test_strided_features_slots_and_rotary(dtype: torch.dtype, device: torch.device) -> None:
    shape = (5, 4, 2, 64, 48)
    found, expected = Case(shape, dtype, device), Case(shape, dtype, device)
    for name in ("q", "k", "v"):
        x = getattr(found, name)
        setattr(found, name, x.transpose(1, 2).contiguous().transpose(1, 2))
    found.slot_mapping = torch.stack([found.slot_mapping, -found.slot_mapping], dim=1)[:, 0]
    found.rotary = torch.cat([found.rotary, found.rotary + 1], dim=-1)[..., :48]
    reshape_and_cache(**found.arguments())
    reshape_and_cache_reference(**expected.arguments())
    assert_same(found, expected, TOLERANCE[dtype])


def test_all_slots_may_be_skipped(device: torch.device) -> None:
    case = Case((4, 2, 2, 64, 64), torch.float32, device)
    case.slot_mapping.fill_(-1)
    reshape_and_cache(**case.arguments())
    assert case.k_cache.isnan().all()
    assert case.v_cache.isnan().all()


@pytest.mark.parametrize(("num_tokens", "rotary_dim"), [(0, 64), (1, 2), (3, 96), (20, 128)])
def test_rotary_is_gathered(num_tokens: int, rotary_dim: int, device: torch.device) -> None:
    table = torch.randn(MAX_POSITION, rotary_dim, device=device)
    positions = torch.randint(0, MAX_POSITION, (num_tokens, 2), device=device)[:, 0]
    found, expected = gather_rotary(table, positions), gather_rotary_reference(table, positions)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
