"""Logit processors that touch few tokens: penalties, bias, masks. All change `logits` in place.

Entry i means the logit of token token_ids[i] in row rows[i]. No pair occurs twice in one call. `logits`, fp32
[num_rows, num_tokens], may be a shard of the vocabulary with first_token_id in column 0: entries of other tokens have
no effect.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.gumbel import EXACT
from kernels.sampling.tile import check_logits

# Far above any logit, and small enough that dividing it by a temperature cannot overflow fp32.
_LOGIT_LIMIT = 1e30
BLOCK = 256
PENALISE, BIAS, MASK = range(3)

_KERNEL_LOGIT_LIMIT = tl.constexpr(_LOGIT_LIMIT)
_BIAS = tl.constexpr(BIAS)
_MASK = tl.constexpr(MASK)


@triton.jit(do_not_specialize=["num_entries"])
def edit_kernel(
    logits_ptr,
    rows_ptr,
    token_ids_ptr,
    seen_ptr,
    amounts_ptr,  # output counts or bias
    settings_ptr,
    num_entries,
    num_tokens,
    first_token_id,
    row_stride,
    EDIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = entry < num_entries
    row = tl.load(rows_ptr + entry, mask=given, other=0)
    column = tl.load(token_ids_ptr + entry, mask=given, other=0) - first_token_id
    inside = given & (column >= 0) & (column < num_tokens)
    place = logits_ptr + row * row_stride + column
    values = tl.load(place, mask=inside, other=0.0)
    if EDIT == _MASK:
        values = tl.full((BLOCK,), -float("inf"), tl.float32)
    else:
        amounts = tl.load(amounts_ptr + entry, mask=given, other=0.0)
        if EDIT == _BIAS:
            values += amounts
        else:
            seen = tl.load(seen_ptr + entry, mask=given, other=0) != 0
            repetition = tl.load(settings_ptr + row * 3, mask=given, other=1.0)
            repeated = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
            values = tl.where(seen, repeated, values)
            values = values - tl.load(settings_ptr + row * 3 + 2, mask=given, other=0.0) * amounts
            presence = tl.load(settings_ptr + row * 3 + 1, mask=given, other=0.0)
            values = values - tl.where(amounts > 0, presence, 0.0)
            values = tl.minimum(tl.maximum(values, -_KERNEL_LOGIT_LIMIT), _KERNEL_LOGIT_LIMIT)
    tl.store(place, values, mask=inside)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    *,
    first_token_id: int = 0,
    seen: Tensor,
    output_counts: Tensor,
    settings: Tensor,
) -> None:
    """Penalises repeated tokens. The three settings mean what they mean in vLLM.

    Args:
        rows, token_ids: int64 [num_entries].
        seen: bool [num_entries], the token occurs in the prompt or the output: its logit is divided by the repetition
            penalty if positive, multiplied by it if negative.
        output_counts: fp32 [num_entries], occurrences in the output: each costs the frequency penalty, and the
            first also costs the presence penalty.
        settings: fp32 [num_rows, 3], contiguous: repetition, presence and frequency penalty.
    """
    if runs_triton(logits):
        _edit(
            logits, rows, token_ids, first_token_id, edit=PENALISE, seen=seen, amounts=output_counts, settings=settings
        )
        return
    rows, columns, inside = _within(logits, rows, token_ids, first_token_id)
    apply_penalties_reference(
        logits, rows, columns, seen=seen[inside], output_counts=output_counts[inside], settings=settings
    )


def apply_penalties_reference(
    logits: Tensor, rows: Tensor, columns: Tensor, *, seen: Tensor, output_counts: Tensor, settings: Tensor
) -> None:
    """`apply_penalties` for entries that are all in the shard."""
    repetition, presence, frequency = settings[rows].unbind(dim=1)
    values = logits[rows, columns]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(seen, repeated, values)
    values = values - frequency * output_counts
    values = values - torch.where(output_counts > 0, presence, 0.0)
    logits[rows, columns] = values.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)


def apply_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, *, first_token_id: int = 0) -> None:
    """Adds bias (fp32 [num_entries])."""
    if runs_triton(logits):
        _edit(logits, rows, token_ids, first_token_id, edit=BIAS, amounts=bias)
        return
    rows, columns, inside = _within(logits, rows, token_ids, first_token_id)
    logits[rows, columns] += bias[inside]


def apply_mask(logits: Tensor, rows: Tensor, token_ids: Tensor, *, first_token_id: int = 0) -> None:
    """Exclude tokens. Here a pair may occur more than once."""
    if runs_triton(logits):
        _edit(logits, rows, token_ids, first_token_id, edit=MASK)
        return
    rows, columns, _ = _within(logits, rows, token_ids, first_token_id)
    logits[rows, columns] = -torch.inf


def _within(logits: Tensor, rows: Tensor, token_ids: Tensor, first_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the entries of this shard, and which these are."""
    columns = token_ids - first_token_id
    inside = (columns >= 0) & (columns < logits.shape[1])
    return rows[inside], columns[inside], inside


def _edit(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    first_token_id: int,
    *,
    edit: int,
    seen: Tensor | None = None,
    amounts: Tensor | None = None,
    settings: Tensor | None = None,
) -> None:
    check_logits(logits)
    num_entries = rows.shape[0]
    if num_entries:
        edit_kernel[(triton.cdiv(num_entries, BLOCK),)](
            logits,
            rows,
            token_ids,
            seen,
            amounts,
            settings,
            num_entries,
            logits.shape[1],
            first_token_id,
            logits.stride(0),
            EDIT=edit,
            BLOCK=BLOCK,
            **EXACT,
        )
