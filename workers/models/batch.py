"""What one forward computes: new tokens of several seqs, packed without padding."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.attention.paged_kv import LengthBounds, SeqLengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token t of the batch belongs to seq b iff cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1]. A seq's tokens are
    consecutive and are the last of its seq_lens[b] tokens; the KV of the earlier ones is already in its blocks. All
    tensors are on one device: the host's in the plan of a step, the model's in its forward."""

    input_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens]: block_id * block_size + offset; -1: the token's KV is not kept
    block_table: Tensor  # int32 [num_seqs, max_blocks]: entries after a seq's last block are not read
    seq_lens: Tensor  # int32 [num_seqs]: KV length, the new tokens included
    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]: starts at 0, ends at num_tokens
    lengths: SeqLengths | LengthBounds  # seq_lens and cu_seqlens_q on the host, so that no step waits for the device

    def to(self, device: torch.device) -> "Batch":
        """The batch on this device. Does not wait."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lengths"}
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in tensors.items()}, lengths=self.lengths)


def new_seqs(num_seqs: int, length: int, block_size: int) -> Batch:
    """Seqs of `length` new tokens each, in blocks of their own from block 0 on, on the host."""
    blocks_of_seq = -(-length // block_size)
    positions = torch.arange(length).repeat(num_seqs)
    seq = torch.arange(num_seqs).repeat_interleave(length)
    seq_lens = torch.full((num_seqs,), length, dtype=torch.int32)
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32) * length
    return Batch(
        input_ids=(positions + seq) % 2,
        positions=positions,
        slot_mapping=seq * blocks_of_seq * block_size + positions,
        block_table=torch.arange(num_seqs * blocks_of_seq, dtype=torch.int32).view(num_seqs, blocks_of_seq),
        seq_lens=seq_lens,
        cu_seqlens_q=bounds,
        lengths=SeqLengths.read(seq_lens, bounds),
    )
