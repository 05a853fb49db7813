"""What a worker group knows about the seq in each slot, laid out so that indexing builds a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.pb.worker_pb2 import Fork, SeqInit
from kernels.attention.paged_kv import SeqLengths
from workers.engine.slot_state import SlotState
from workers.models.batch import Batch
from workers.sampling.grammar import GrammarCompiler
from workers.sampling.state import SeqSamplingState


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The capacity of an engine. A round that asks for more is a protocol error."""

    num_slots: int
    max_model_len: int  # of one seq, prompt and output
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_batched_tokens: int  # of a round, through a target
    num_host_slots: int = 0  # that attention can read; 0: it reads the device only

    @property
    def max_blocks(self) -> int:
        """Most blocks of one seq."""
        return -(-self.max_model_len // self.block_size)


class SeqTable:
    """The slots of one engine.

    A seq has a history `token_ids[slot, :lengths[slot]]`; on a draft engine the chain of its own drafts follows in it.
    The first `num_computed[slot]` tokens have KV, in the blocks `block_table[slot, :num_blocks[slot]]`, of which the
    first `num_in_host[slot]` are slots of host memory. A draft engine knows two more things. The first
    `num_given[slot]` tokens came from the scheduler, and the engine drafted the rest. The exact model computed the KV
    of the first `num_exact[slot]` tokens. Later KV may be approximate.

    Each property of all slots is one array, so that no Python runs per token and little per seq. SlotState defines
    how the changes of a round move these values. Not thread-safe. Methods trust their arguments; rounds.py checks them.
    """

    def __init__(self, limits: Limits, grammars: GrammarCompiler | None = None) -> None:
        """Without `grammars`, no seq may have one."""
        slots = limits.num_slots
        self.limits = limits
        self._grammars = grammars
        self.token_ids: NDArray[np.int32] = np.zeros(
            (slots, limits.max_model_len), np.int32
        )  # the system gives memory to a page on first use
        self.block_table: NDArray[np.int32] = np.zeros((slots, limits.max_blocks), np.int32)
        self.lengths: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_prompt: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_computed: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_exact: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_given: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_blocks: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.num_in_host: NDArray[np.int64] = np.zeros(slots, np.int64)
        self.fell_short: NDArray[np.bool_] = np.zeros(slots, np.bool_)  # the chain ended before all ordered tokens
        self.is_void: NDArray[np.bool_] = np.zeros(slots, np.bool_)  # a branch of tokens that were never drafted
        self.num_prompt_logprobs: list[int | None] = [None] * slots  # top-n wanted; None: not requested
        self._sampling: list[SeqSamplingState | None] = [None] * slots

    def holds(self, slot: int) -> bool:
        return 0 <= slot < len(self._sampling) and self._sampling[slot] is not None

    def sampling(self, slot: int) -> SeqSamplingState:
        state = self._sampling[slot]
        assert state is not None, f"slot {slot} holds no seq"
        return state

    def state(self, slot: int) -> SlotState:
        """A copy of a slot's counters."""
        return SlotState(
            length=int(self.lengths[slot]),
            num_computed=int(self.num_computed[slot]),
            num_exact=int(self.num_exact[slot]),
            num_given=int(self.num_given[slot]),
            num_blocks=int(self.num_blocks[slot]),
            num_prompt=int(self.num_prompt[slot]),
            num_in_host=int(self.num_in_host[slot]),
            fell_short=bool(self.fell_short[slot]),
            is_void=bool(self.is_void[slot]),
        )

    def _store(self, slot: int, state: SlotState) -> None:
        self.lengths[slot] = state.length
        self.num_computed[slot] = state.num_computed
        self.num_exact[slot] = state.num_exact
        self.num_given[slot] = state.num_given
        self.num_blocks[slot] = state.num_blocks
        self.num_prompt[slot] = state.num_prompt
        self.num_in_host[slot] = state.num_in_host
        self.fell_short[slot] = state.fell_short
        self.is_void[slot] = state.is_void

    def init(self, seq: SeqInit) -> None:
        """Put a seq with its history into a free slot. The output part of the history counts for penalties."""
        slot = seq.slot
        self._store(slot, SlotState.of_init(seq))
        self.token_ids[slot, : len(seq.token_ids)] = seq.token_ids
        self.block_table[slot, : len(seq.block_table)] = seq.block_table
        wants_prompt_logprobs = seq.sampling.HasField("prompt_logprobs")
        self.num_prompt_logprobs[slot] = seq.sampling.prompt_logprobs if wants_prompt_logprobs else None
        grammar = None
        if seq.sampling.HasField("grammar"):
            assert self._grammars is not None, f"slot {slot}: this engine compiles no grammars"
            grammar = self._grammars.start(seq.sampling.grammar)
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        state = SeqSamplingState(seq.sampling, prompt, self.limits.vocab_size, grammar)
        state.extend(seq.token_ids[seq.num_prompt_tokens :])
        self._sampling[slot] = state

    def fork(self, fork: Fork) -> tuple[int, int] | None:
        """Put a branch into a free slot. It has its parent's settings and first tokens, and the blocks that these fill.

        Returns:
            The parent's block to copy and the branch's own block that receives it, or None if there is nothing to copy.
            If the parent has fewer tokens, the branch is void: it occupies its slot and does nothing.
        """
        slot, parent, length = fork.slot, fork.parent_slot, fork.length
        sampling = self.sampling(parent)
        branch = self.state(parent).fork(length, self.limits.block_size)
        self._store(slot, branch)
        self._sampling[slot] = sampling if branch.is_void else sampling.branch(length)
        if branch.is_void:
            return None
        self.token_ids[slot, :length] = self.token_ids[parent, :length]
        self.num_prompt_logprobs[slot] = self.num_prompt_logprobs[parent]
        num_shared = branch.num_blocks
        self.block_table[slot, :num_shared] = self.block_table[parent, :num_shared]
        self.add_blocks(slot, fork.new_block_ids)
        if branch.num_computed <= num_shared * self.limits.block_size:
            return None
        return int(self.block_table[parent, num_shared]), int(self.block_table[slot, num_shared])

    def free(self, slot: int) -> None:
        self._sampling[slot] = None

    def free_all(self) -> None:
        self._sampling = [None] * len(self._sampling)

    def crop(self, slot: int, length: int) -> None:
        """Cut the history to `length` tokens. The KV of later tokens is stale."""
        state = self.state(slot)
        state.crop(length)
        self._store(slot, state)
        self.sampling(slot).truncate(length)

    def give(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append the scheduler's tokens to the history, without KV."""
        state = self.state(slot)
        start = state.length
        state.give(len(token_ids))
        self._store(slot, state)
        self.token_ids[slot, start : state.length] = token_ids
        self.sampling(slot).extend(token_ids)

    def append(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append `token_ids[i]` to the history of `slots[i]`, without KV. Slots are distinct."""
        slot = np.array(slots, np.int64)  # [num_seqs]
        count = np.fromiter(map(len, token_ids), np.int64, len(slot))
        positions = _ranges(self.lengths[slot], count)
        self.token_ids[np.repeat(slot, count), positions] = [token_id for tokens in token_ids for token_id in tokens]
        self.lengths[slot] += count
        for index, tokens in zip(slots, token_ids, strict=True):
            self.sampling(index).extend(tokens)

    def compute(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Batch:
        """Pack counts[i] tokens of slots[i], from starts[i] on, for the exact model and count their KV as exact.

        Some of them may have KV already. Those that `put_drafts` wrote do not count.
        """
        slot, start = np.array(slots, np.int64), np.array(starts, np.int64)
        held, exact = self.num_computed[slot], self.num_exact[slot]
        end = np.minimum(start + np.array(counts, np.int64), self.lengths[slot])
        self.num_computed[slot] = np.maximum(held, end)
        # KV that the exact model computes from approximate KV is still approximate.
        self.num_exact[slot] = np.where(start <= exact, np.maximum(exact, end), exact)
        return self.pack_from(slots, starts, counts)

    def forget_last(self, slot: int) -> None:
        """Count the last token as one without KV."""
        self.num_computed[slot] = min(self.num_computed[slot], self.lengths[slot] - 1)
        self.num_exact[slot] = min(self.num_exact[slot], self.num_computed[slot])

    def put_drafts(self, slot: int, draft_token_ids: Sequence[int]) -> None:
        """Write tokens after the end of the history without adding them, as the input of a verify step."""
        start = int(self.lengths[slot])
        self.token_ids[slot, start : start + len(draft_token_ids)] = draft_token_ids

    def drafts(self, slot: int, num_tokens: int) -> list[int]:
        """The tokens that `put_drafts` wrote."""
        start = int(self.lengths[slot])
        return self.token_ids[slot, start : start + num_tokens].tolist() if num_tokens else []

    def add_blocks(self, slot: int, block_ids: Sequence[int]) -> None:
        state = self.state(slot)
        start = state.num_blocks
        state.add_blocks(len(block_ids))
        self._store(slot, state)
        self.block_table[slot, start : state.num_blocks] = block_ids

    def move_to_host(self, slot: int, host_slots: Sequence[int]) -> None:
        """The first blocks on the device are read from these host slots from now on."""
        state = self.state(slot)
        start = state.num_in_host
        state.move_to_host(len(host_slots))
        self._store(slot, state)
        self.block_table[slot, start : state.num_in_host] = host_slots

    def blocks(self, slots: Sequence[int], num_tokens: int) -> torch.Tensor:
        """The blocks of so many tokens of each slot, on the host: int32 [num_seqs, max_blocks]."""
        width = -(-num_tokens // self.limits.block_size)
        return torch.from_numpy(self.block_table[list(slots), :width])

    def pack(self, slots: Sequence[int], counts: Sequence[int]) -> Batch:
        """Pack the next `counts[i]` tokens without KV of each `slots[i]`, one seq after another, on the host.

        The count may run past the history, into tokens that `put_drafts` wrote.
        """
        return self.pack_from(slots, self.num_computed[list(slots)].tolist(), counts)

    def pack_from(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Batch:
        """As `pack`, from `starts[i]` on."""
        slot = np.array(slots, np.int64)  # [num_seqs]
        count = np.array(counts, np.int64)
        start = np.array(starts, np.int64)
        cu_seqlens_q = np.zeros(len(slot) + 1, np.int32)
        np.cumsum(count, out=cu_seqlens_q[1:])
        token_slot = np.repeat(slot, count)  # [num_tokens]
        positions = _ranges(start, count)
        block_size = self.limits.block_size
        block = self.block_table[token_slot, positions // block_size].astype(np.int64)
        seq_lens = (start + count).astype(np.int32)
        width = -(-int(seq_lens.max()) // block_size)

        return Batch(
            input_ids=torch.from_numpy(self.token_ids[token_slot, positions].astype(np.int64)),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(block * block_size + positions % block_size),
            block_table=torch.from_numpy(self.block_table[slot, :width]),
            seq_lens=torch.from_numpy(seq_lens),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
            lengths=SeqLengths(seq_lens, cu_seqlens_q),
        )


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each i the counts[i] numbers starts[i], starts[i] + 1, ..., all in one array."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    numbers: NDArray[np.int64] = np.arange(total, dtype=np.int64) + np.repeat(starts - ends + counts, counts)
    return numbers
