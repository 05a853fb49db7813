"""The kernels of quantised KV blocks give the bits of the references."""

import pytest
import torch

from kernels.kv.kv_quant import (
    dequantise_blocks,
    dequantise_blocks_reference,
    quantise_blocks,
    quantise_blocks_reference,
)

# num_blocks and num_layers, keys and values, block_size, num_kv_heads, head_dim
SHAPES = [(2, 1, 2, 16, 2, 64), (3, 2, 5, 3, 96), (1, 2, 1, 1, 128), (2, 8, 1, 2), (0, 2, 16, 2, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "large", "tiny", "constant"])
def test_codes_and_their_values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device) -> None:
    kv = torch.randn(shape, device=device)
    if kind == "large":
        kv = kv * (1e30 if dtype != torch.float16 else 1e4)
    if kind == "tiny":
        kv = kv * 1e-38  # steps that fp32 holds with fewer bits
    if kind == "constant":
        kv = kv[..., :1, :].expand(shape).clone() if kv.numel() else kv
        kv[..., 0] = kv[..., 1]
    kv = kv.to(dtype).contiguous()
    found, expected = quantise_blocks(kv), quantise_blocks_reference(kv)
    for name in ("upper", "lower", "k_scales", "v_scales"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for bits in (4, 8):
        out, right = torch.full_like(kv, torch.nan), torch.empty_like(kv)
        dequantise_blocks(found, out, bits=bits)
        dequantise_blocks_reference(expected, right, bits=bits)
        assert torch.equal(out, right)
