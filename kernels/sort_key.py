"""A float and a token id in one integer whose order is: larger value first, lower id first among equals."""

import torch
from torch import Tensor

ID_MASK = 0xFFFFFFFF


def pack_sort_key(values: Tensor, token_ids: Tensor) -> Tensor:
    """fp32 values without NaN and int64 ids in [0, 2^32), broadcastable -> int64, the larger the better."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0, so that the two are equal here as well
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats: a larger magnitude becomes a smaller integer
    return (ordered.to(torch.int64) << 32) | (ID_MASK - token_ids)


def unpack_sort_key(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the token ids that `pack_sort_key` was given."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), ID_MASK - (keys & ID_MASK)


def top_sort_keys(values: Tensor, num_top: int, *, first_token_id: int = 0) -> Tensor:
    """Keys of the best tokens of each row, best first: fp32 [num_rows, num_tokens] -> int64 [num_rows, num_top].

    No two keys are equal, so nothing is left to how a device orders ties. Fewer columns where there are fewer tokens.
    """
    num_tokens = values.shape[1]
    token_ids = torch.arange(first_token_id, first_token_id + num_tokens, device=values.device)
    return pack_sort_key(values, token_ids).topk(min(num_top, num_tokens), dim=1).values
