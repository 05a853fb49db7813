"""The batch that captured steps read."""

import torch

from checkpoint.captured_sizes import StepSize
from kernels.attention.paged_kv import LengthBounds
from workers.captured.static_tensor import StaticTensor, Uploads
from workers.models.batch import Batch

_NOT_KEPT = -1  # the slot of a token whose keys and values are not written


class StaticBatch:
    """One set of tensors for all sizes of steps; a smaller step uses their first rows.

    Padding is made of tokens that belong to no seq and are not kept, and of seqs without tokens. So no step writes to a
    block that its batch does not name, and none of its rows sees another seq's keys.
    """

    def __init__(self, most: StepSize, *, num_tokens: int, max_blocks: int, device: torch.device) -> None:
        """`num_tokens`: of the size that has most of them."""

        def zeros(*shape: int, dtype: torch.dtype) -> StaticTensor:
            return StaticTensor.zeros(*shape, dtype=dtype, device=device)

        self._input_ids = zeros(num_tokens, dtype=torch.int64)
        self._positions = zeros(num_tokens, dtype=torch.int64)
        self._slot_mapping = zeros(num_tokens, dtype=torch.int64)
        self._block_table = zeros(most.num_seqs, max_blocks, dtype=torch.int32)
        self._seq_lens = zeros(most.num_seqs, dtype=torch.int32)
        self._cu_seqlens_q = zeros(most.num_seqs + 1, dtype=torch.int32)
        self._uploads = Uploads(device)

    def batch(self, size: StepSize) -> Batch:
        """What a step of this size reads."""
        num_tokens, num_seqs = size.num_tokens, size.num_seqs
        return Batch(
            input_ids=self._input_ids.there[:num_tokens],
            positions=self._positions.there[:num_tokens],
            slot_mapping=self._slot_mapping.there[:num_tokens],
            block_table=self._block_table.there[:num_seqs],
            seq_lens=self._seq_lens.there[:num_seqs],
            cu_seqlens_q=self._cu_seqlens_q.there[: num_seqs + 1],
            lengths=LengthBounds(num_seqs, size.max_new),
        )

    def fill(self, batch: Batch, size: StepSize) -> None:
        """Let the next step of this size compute a batch on the host, which has room in it. Does not wait."""
        num_tokens, num_seqs = size.num_tokens, size.num_seqs
        self._uploads.begin()
        self._input_ids.fill(batch.input_ids, num_tokens, padding=0)
        self._positions.fill(batch.positions, num_tokens, padding=0)
        self._slot_mapping.fill(batch.slot_mapping, num_tokens, padding=_NOT_KEPT)
        self._block_table.fill_columns(batch.block_table, num_seqs)
        self._seq_lens.fill(batch.seq_lens, num_seqs, padding=0)
        self._cu_seqlens_q.fill(batch.cu_seqlens_q, num_seqs + 1, padding=batch.input_ids.shape[0])
        self._uploads.end()
