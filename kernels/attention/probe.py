"""Whether attention with `batch_invariant` keeps its promise on this machine. It needs products that round a row the
same way wherever it is in a tile, which is a property of the machine."""

import torch
from torch import Tensor

from kernels.attention.paged_attention import paged_attention

_LENGTH = 300  # more than one key tile on each device
BLOCK_SIZE = 16
CHUNKS = (1, 7, 64)
CPU = torch.device("cpu")


def probe_paged_attention(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> str | None:
    """Compare the rows of a prefill in one piece with the same rows in pieces and alone, bit for bit.

    On CPU the products are fp32 whatever the cache holds, so one probe serves all dtypes. Returns None if the bits
    agree on this machine (on CPU, with this number of threads), else one sentence for the user.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-_LENGTH // BLOCK_SIZE)
    q = torch.randn(_LENGTH, num_q_heads, head_dim, generator=generator).to(device, dtype)
    cache_shape = (2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = torch.randn(cache_shape, generator=generator).to(device, dtype)
    block_table = torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0)

    def rows(start: int, end: int) -> Tensor:
        return paged_attention(
            q[start:end],
            k_cache,
            v_cache,
            block_table,
            torch.tensor([end], dtype=torch.int32, device=device),
            torch.tensor([0, end - start], dtype=torch.int32, device=device),
            softmax_scale=head_dim**-0.5,
            batch_invariant=True,
        )

    whole = rows(0, _LENGTH)
    for chunk in CHUNKS:
        for start in [*range(0, _LENGTH - chunk, 37), _LENGTH - chunk]:
            if not torch.equal(rows(start, start + chunk), whole[start : start + chunk]):
                threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
                return (
                    f"attention with {num_q_heads} query heads, {num_kv_heads} KV heads and head_dim {head_dim} rounds "
                    f"a token differently in a chunk of {chunk} than in one of {_LENGTH}{threads}, "
                    f"so batch_invariant cannot be kept on {device.type} here"
                )
    return None
