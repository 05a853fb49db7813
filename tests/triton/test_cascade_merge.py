"""The merge kernel, compared with its reference."""

import pytest
import torch

from kernels.upcoming.cascade_merge import cascade_merge, cascade_merge_reference


@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(0, 2, 64), (1, 1, 96), (5, 7, 64), (19, 2, 128)])
def test_merge(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    first, second = (
        (
            torch.randn(num_tokens, num_heads, head_dim, device=device).to(dtype),
            torch.randn(num_tokens, num_heads, device=device) * 30,
        )
        for _ in range(2)
    )
    for row, parts in enumerate([(first,), (second,), (first, second)]):  # the first, the second or both have no keys
        for o, lse in parts:
            o[row : row + 1] = torch.nan
            lse[row : row + 1] = -torch.inf
    o, lse = cascade_merge(first, second)
    expected_o, expected_lse = cascade_merge_reference(first, second)
    assert o.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # just over an ulp of 1
    torch.testing.assert_close(o, expected_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    swapped_o, swapped_lse = cascade_merge(second, first)
    assert torch.equal(swapped_o, o)
    assert torch.equal(swapped_lse, lse)
    cascade_merge(first, second, out=first[0])
    assert torch.equal(first[0], o)
