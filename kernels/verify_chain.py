"""How much of each seq's drafted chain the target's own tokens confirm, and the token that follows."""

import torch
from torch import Tensor


def verify_chain(target_token_ids: Tensor, draft_token_ids: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts each chain while the drafts equal the target's own tokens.

    A seq with k drafts has k + 1 rows. In its row j stands the token that the target chose behind j drafts, and draft
    j; the last row has no draft. The first target token that differs from the draft beside it *is* the next token: it
    was chosen by the target behind accepted tokens only (drawing again would change the law of the output).
    Source: arXiv 2408.07978.

    Args:
        target_token_ids: int64 [num_rows].
        draft_token_ids: int64 [num_rows]; -1 in the last row of each seq.
        cu_rows: integer [num_seqs + 1], ascending from 0 to num_rows: seq b has rows cu_rows[b] .. cu_rows[b+1] - 1.
    Returns:
        num_accepted: int64 [num_seqs], 0 .. k.
        next_token_ids: int64 [num_seqs].
    """
    if target_token_ids.shape != draft_token_ids.shape:
        raise ValueError(
            f"target_token_ids and draft_token_ids must have one shape, got {tuple(target_token_ids.shape)} and "
            f"{tuple(draft_token_ids.shape)}"
        )
    return verify_chain_reference(target_token_ids, draft_token_ids, cu_rows)


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
