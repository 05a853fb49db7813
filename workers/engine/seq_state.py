"""What a group remembers of each seq that holds a slot, laid out so that a batch is built by indexing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.pb.worker_pb2 import Fork, SeqInit
from kernels.attention.paged_kv import SeqLengths
from workers.models.batch import Batch
from workers.sampling.sampler import SeqSamplingState


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much an engine can hold; a round that asks for more is a protocol error."""

    num_slots: int
    max_model_len: int  # tokens of one seq, prompt and output
    vocab_size: int
    block_size: int
    num_blocks: int

    @property
    def max_blocks(self) -> int:
        """Blocks of one seq."""
        return -(-self.max_model_len // self.block_size)


class SeqTable:
    """The slots of one engine.

    A seq has a history `token_ids[slot, :lengths[slot]]` (on a draft engine followed by the chain of its own drafts),
    of which the first `num_computed[slot]` tokens have KV, in the blocks `block_table[slot, :num_blocks[slot]]`.
    A draft engine knows two things more. The first `num_given[slot]` tokens came from the scheduler, those behind them
    it drafted itself. And the KV of the first `num_exact[slot]` tokens is that of the exact model, KV behind it may be
    approximate.

    Everything is a row of one array, so that no Python runs per token and little per seq. Not thread-safe; methods
    trust their arguments, which workers/engine/rounds.py has checked.
    """

    def __init__(self, limits: Limits) -> None:
        slots = limits.num_slots
        self.limits = limits
        self.token_ids: NDArray[np.int32] = np.zeros((slots, limits.max_model_len), np.int32)  # pages come when used
        self.block_table: NDArray[np.int32] = np.zeros((slots, limits.max_blocks), np.int32)
        self.lengths: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_prompt: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_computed: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_exact: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_given: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_blocks: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.fell_short: NDArray[np.bool_] = np.zeros(slots, np.bool_)  # the chain ended before all that was ordered
        self.is_void: NDArray[np.bool_] = np.zeros(slots, np.bool_)  # a branch of tokens that never came to be
        self.num_prompt_logprobs: list[int | None] = [None] * slots  # top-n wanted, None: not asked for
        self._sampling: list[SeqSamplingState | None] = [None] * slots

    def holds(self, slot: int) -> bool:
        return 0 <= slot < len(self._sampling) and self._sampling[slot] is not None

    def sampling(self, slot: int) -> SeqSamplingState:
        state = self._sampling[slot]
        assert state is not None, f"slot {slot} holds no seq"
        return state

    def sizes(self, slot: int) -> tuple[int, int, int, int]:
        """Tokens, tokens with KV, blocks and prompt tokens of a seq."""
        return (
            int(self.lengths[slot]),
            int(self.num_computed[slot]),
            int(self.num_blocks[slot]),
            int(self.num_prompt[slot]),
        )

    def init(self, seq: SeqInit) -> None:
        """A seq takes a free slot with its history; the output part of it counts for penalties."""
        slot, num_tokens, num_blocks = seq.slot, len(seq.token_ids), len(seq.block_table)
        self.token_ids[slot, :num_tokens] = seq.token_ids
        self.lengths[slot] = num_tokens
        self.num_prompt[slot] = seq.num_prompt_tokens
        self.num_computed[slot] = self.num_exact[slot] = seq.num_computed_tokens
        self.num_given[slot] = num_tokens
        self.fell_short[slot] = self.is_void[slot] = False
        self.block_table[slot, :num_blocks] = seq.block_table
        self.num_blocks[slot] = num_blocks
        wants_prompt_logprobs = seq.sampling.HasField("prompt_logprobs")
        self.num_prompt_logprobs[slot] = seq.sampling.prompt_logprobs if wants_prompt_logprobs else None
        state = SeqSamplingState(seq.sampling, seq.token_ids[: seq.num_prompt_tokens], self.limits.vocab_size)
        state.extend(seq.token_ids[seq.num_prompt_tokens :])
        self._sampling[slot] = state

    def fork(self, fork: Fork) -> tuple[int, int] | None:
        """A branch takes a free slot: settings and first tokens of its parent, and the blocks that are full of them.

        Returns:
            A block of the parent with KV that the branch needs in a block of its own, and that block; None if none is.
            A parent that does not have so many tokens leaves a void: a slot that is taken and does nothing.
        """
        slot, parent, length = fork.slot, fork.parent_slot, fork.length
        sampling = self.sampling(parent)
        self.is_void[slot] = self.is_void[parent] or length > self.lengths[parent]
        self._sampling[slot] = sampling if self.is_void[slot] else sampling.branch(length)
        if self.is_void[slot]:
            return None
        self.token_ids[slot, :length] = self.token_ids[parent, :length]
        self.lengths[slot] = length
        for counts in (self.num_computed, self.num_exact, self.num_given):
            counts[slot] = min(counts[parent], length)
        self.num_prompt[slot] = self.num_prompt[parent]
        self.num_prompt_logprobs[slot] = self.num_prompt_logprobs[parent]
        self.fell_short[slot] = False
        num_shared = length // self.limits.block_size
        self.block_table[slot, :num_shared] = self.block_table[parent, :num_shared]
        self.num_blocks[slot] = num_shared
        self.add_blocks(slot, fork.new_block_ids)
        if self.num_computed[slot] <= num_shared * self.limits.block_size:
            return None
        return int(self.block_table[parent, num_shared]), int(self.block_table[slot, num_shared])

    def free(self, slot: int) -> None:
        self._sampling[slot] = None

    def free_all(self) -> None:
        self._sampling = [None] * len(self._sampling)

    def crop(self, slot: int, length: int) -> None:
        """Cut the history to `length` tokens; KV beyond is stale."""
        self.lengths[slot] = length
        for counts in (self.num_computed, self.num_exact, self.num_given):
            counts[slot] = min(counts[slot], length)
        self.fell_short[slot] = False
        self.sampling(slot).truncate(length)

    def give(self, slot: int, token_ids: Sequence[int]) -> None:
        """The scheduler's own tokens join the history, without KV."""
        self.append([slot], [token_ids])
        self.num_given[slot] = self.lengths[slot]
        self.fell_short[slot] = False

    def append(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """`token_ids[i]` join the history of `slots[i]`, without KV. A slot is named once at most."""
        slot = np.array(slots, np.int64)  # [num_seqs]
        count = np.fromiter(map(len, token_ids), np.int64, len(slot))
        positions = _ranges(self.lengths[slot], count)
        self.token_ids[np.repeat(slot, count), positions] = [token_id for tokens in token_ids for token_id in tokens]
        self.lengths[slot] += count
        for index, tokens in zip(slots, token_ids, strict=True):
            self.sampling(index).extend(tokens)

    def compute(
        self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> Batch:
        """counts[i] tokens of slots[i] from starts[i] on, some of which may have KV already: packed for the exact model
        and counted as computed by it."""
        slot, start = np.array(slots, np.int64), np.array(starts, np.int64)
        end = start + np.array(counts, np.int64)
        held, exact = self.num_computed[slot], self.num_exact[slot]
        self.num_computed[slot] = start
        batch = self.pack(slots, counts, device)
        self.num_computed[slot] = np.maximum(held, end)
        # Computed by the exact model behind approximate KV is approximate all the same.
        self.num_exact[slot] = np.where(start <= exact, np.maximum(exact, end), exact)
        return batch

    def forget_last(self, slot: int) -> None:
        """The last token counts as one without KV."""
        self.num_computed[slot] = min(self.num_computed[slot], self.lengths[slot] - 1)
        self.num_exact[slot] = min(self.num_exact[slot], self.num_computed[slot])

    def put_behind(self, slot: int, draft_token_ids: Sequence[int]) -> None:
        """Tokens are written behind the history without joining it: input of a verify step."""
        start = int(self.lengths[slot])
        self.token_ids[slot, start : start + len(draft_token_ids)] = draft_token_ids

    def behind(self, slot: int, num_tokens: int) -> list[int]:
        """What `put_behind` has written."""
        start = int(self.lengths[slot])
        return self.token_ids[slot, start : start + num_tokens].tolist() if num_tokens else []

    def add_blocks(self, slot: int, block_ids: Sequence[int]) -> None:
        start = int(self.num_blocks[slot])
        self.block_table[slot, start : start + len(block_ids)] = block_ids
        self.num_blocks[slot] = start + len(block_ids)

    def pack(self, slots: Sequence[int], counts: Sequence[int], device: torch.device) -> Batch:
        """The next `counts[i]` tokens without KV of each `slots[i]`, packed behind each other.

        Tokens that stand in `token_ids` behind the history (drafts to be verified) are taken as well.
        """
        slot = np.array(slots, np.int64)  # [num_seqs]
        count = np.array(counts, np.int64)
        start = self.num_computed[slot]
        cu_seqlens_q = np.zeros(len(slot) + 1, np.int32)
        np.cumsum(count, out=cu_seqlens_q[1:])
        token_slot = np.repeat(slot, count)  # [num_tokens]
        positions = _ranges(start, count)
        block_size = self.limits.block_size
        block = self.block_table[token_slot, positions // block_size].astype(np.int64)
        seq_lens = (start + count).astype(np.int32)
        width = -(-int(seq_lens.max()) // block_size)

        def upload(array: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return Batch(
            input_ids=upload(self.token_ids[token_slot, positions].astype(np.int64)),
            positions=upload(positions),
            slot_mapping=upload(block * block_size + positions % block_size),
            block_table=upload(self.block_table[slot, :width]),
            seq_lens=upload(seq_lens),
            cu_seqlens_q=upload(cu_seqlens_q),
            lengths=SeqLengths(seq_lens, cu_seqlens_q),
        )


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[i], starts[i] + 1, ... counts[i] numbers for each i, behind each other."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    numbers: NDArray[np.int64] = np.arange(total, dtype=np.int64) + np.repeat(starts - ends + counts, counts)
    return numbers
