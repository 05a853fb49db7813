"""How much of each seq's drafted chain the target's own tokens confirm, and the token that follows."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

BLOCK = 32  # rows processed together: more than nearly all chains have


@triton.jit(do_not_specialize_on_alignment=["next_token_ids_ptr"])
def verify_chain_kernel(
    num_accepted_ptr,
    next_token_ids_ptr,
    target_token_ids_ptr,
    draft_token_ids_ptr,
    cu_rows_ptr,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    first = tl.load(cu_rows_ptr + seq).to(tl.int64)
    end = tl.load(cu_rows_ptr + seq + 1).to(tl.int64)
    start = first
    stop = end
    while (start < end) & (stop == end):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(target_token_ids_ptr + row, mask=row < end, other=0)
        draft = tl.load(draft_token_ids_ptr + row, mask=row < end, other=0)
        stop = tl.min(tl.where((row < end) & ((target != draft) | (draft < 0)), row, end), axis=0)
        start += BLOCK
    tl.store(num_accepted_ptr + seq, stop - first)
    tl.store(next_token_ids_ptr + seq, tl.load(target_token_ids_ptr + stop))


def verify_chain(target_token_ids: Tensor, draft_token_ids: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts each chain as long as the drafts equal the target's own tokens.

    A seq with k drafts has k + 1 rows. Row j holds draft j and the token that the target chose after j drafts. The last
    row has no draft. The first target token that differs from the draft in its row *is* the next token: the target
    chose it after accepted tokens only (drawing again would change the distribution of the output).
    Source: arXiv 2408.07978.

    Args:
        target_token_ids: int64 [num_rows], contiguous.
        draft_token_ids: int64 [num_rows], contiguous; -1 in the last row of each seq.
        cu_rows: integer [num_seqs + 1], contiguous, ascending from 0 to num_rows: seq b has rows cu_rows[b] up to
            cu_rows[b + 1] - 1.
    Returns:
        num_accepted: int64 [num_seqs], 0 .. k.
        next_token_ids: int64 [num_seqs].
    """
    if target_token_ids.shape != draft_token_ids.shape:
        raise ValueError(
            f"target_token_ids and draft_token_ids must have one shape, got {tuple(target_token_ids.shape)} and "
            f"{tuple(draft_token_ids.shape)}"
        )
    for name, x in (
        ("target_token_ids", target_token_ids),
        ("draft_token_ids", draft_token_ids),
        ("cu_rows", cu_rows),
    ):
        if x.ndim != 1 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {tuple(x.shape)} with strides {x.stride()}")
    if not runs_triton(target_token_ids):
        return verify_chain_reference(target_token_ids, draft_token_ids, cu_rows)
    num_seqs = cu_rows.shape[0] - 1
    num_accepted, next_token_ids = torch.empty((2, num_seqs), dtype=torch.int64, device=cu_rows.device)
    if num_seqs:
        verify_chain_kernel[(num_seqs,)](
            num_accepted, next_token_ids, target_token_ids, draft_token_ids, cu_rows, BLOCK=BLOCK, num_warps=1
        )
    return num_accepted, next_token_ids


def verify_chain_reference(target_token_ids: Tensor, draft_token_ids: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = target_token_ids.shape[0]
    row = torch.arange(num_rows, device=target_token_ids.device)
    stops = (target_token_ids != draft_token_ids) | (draft_token_ids < 0)
    stop_row = torch.where(stops, row, num_rows)
    # The first stop at or after each row. It belongs to the row's own seq, since the last row of a seq stops.
    next_stop = stop_row.flip(0).cummin(dim=0).values.flip(0)
    first_row = cu_rows[:-1].to(torch.int64)
    stop = next_stop[first_row]  # [num_seqs]
    return stop - first_row, target_token_ids[stop]
