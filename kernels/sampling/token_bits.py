"""Excludes the tokens that a grammar forbids, given a bit for each token of the vocabulary."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.tile import check_logits

BLOCK = 1024


@triton.jit
def token_bits_kernel(
    logits_ptr, rows_ptr, bits_ptr, num_tokens, first_token_id, row_stride, bits_stride, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_tokens
    token_ids = columns + first_token_id
    known = inside & (token_ids < bits_stride * 32)
    words = tl.load(bits_ptr + entry * bits_stride + (token_ids >> 5), mask=known, other=0)
    forbidden = ((words >> (token_ids & 31)) & 1) == 0
    row = tl.load(rows_ptr + entry)
    place = logits_ptr + row * row_stride + columns
    tl.store(place, tl.full((BLOCK,), -float("inf"), tl.float32), mask=inside & forbidden)


def apply_token_bits(logits: Tensor, rows: Tensor, bits: Tensor, *, first_token_id: int = 0) -> None:
    """Sets the logits of forbidden tokens to -Inf, in place.

    Args:
        logits: fp32 [num_rows, num_tokens], perhaps a shard of the vocabulary with first_token_id in column 0.
        rows: int64 [num_entries], distinct.
        bits: int32 [num_entries, num_words], contiguous. Bit v % 32 of word v // 32 allows token v in that row. Tokens
            beyond the last word are forbidden.
    """
    check_logits(logits)
    num_entries, num_tokens = rows.shape[0], logits.shape[1]
    if not runs_triton(logits):
        apply_token_bits_reference(logits, rows, bits, first_token_id=first_token_id)
    elif num_entries:
        token_bits_kernel[(num_entries, triton.cdiv(num_tokens, BLOCK))](
            logits, rows, bits, num_tokens, first_token_id, logits.stride(0), bits.shape[1], BLOCK=BLOCK
        )


def apply_token_bits_reference(logits: Tensor, rows: Tensor, bits: Tensor, *, first_token_id: int = 0) -> None:
    """Looks up what to add for each byte, which takes a tenth of the time of shifting bits out of words."""
    num_tokens = logits.shape[1]
    is_allowed = (torch.arange(256, device=bits.device).unsqueeze(1) >> torch.arange(8, device=bits.device)) & 1 == 1
    summands = torch.where(is_allowed, 0.0, -torch.inf)  # [256, 8]
    for row, words in zip(rows.tolist(), bits, strict=True):
        own = words.view(torch.uint8)[first_token_id // 8 : -(-(first_token_id + num_tokens) // 8)]
        known = summands.index_select(0, own.int()).flatten()[first_token_id % 8 :][:num_tokens]
        logits[row, : len(known)].add_(known)
        logits[row, len(known) :] = -torch.inf
