"""A small model beneath a draft: it writes a few tokens, which the draft verifies in one forward.

It has the seqs, the block tables and the noise of its draft, and a KV cache of its own with as many blocks. What a
block of that cache holds is written down token by token. So nothing has to be told of rows that cut a chain, of
branches, of blocks that change hands or come back from another tier: what a history and its blocks have in common is
computed, and the rest is not. Multi-level drafting: ML-SpecQD, arXiv 2503.13565.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.engine import NO_TOKEN, ModelRunner, chosen_token_ids
from workers.engine.lower_draft import NOTHING, LowerDraft, Pace, Proposal, Wanted
from workers.engine.seq_state import Limits, SeqTable
from workers.sampling.rows import RowEntry
from workers.upload import upload

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NO_KV = -1


class LowerModel(LowerDraft):
    """See LowerDraft. Dies alone: if its one rank fails, the draft goes on without it.

    `limits`: of the draft. `max_model_len`: tokens of a seq that the model can hold. Between several ranks a failure
    ends the group, since the others wait in a collective.
    """

    def __init__(self, runner: ModelRunner, limits: Limits, pace: Pace, *, max_model_len: int) -> None:
        super().__init__()
        self._runner = runner
        self._limits = limits
        self._pace = pace
        self._max_model_len = max_model_len
        self._vocab_size = runner.model.config.vocab_size
        self._held: NDArray[np.int32] = np.full((limits.num_blocks, limits.block_size), _NO_KV, np.int32)
        self._is_dead = False

    def follow(self, table: SeqTable, slots: Sequence[int]) -> None:
        """Compute what the draft has computed, so that a prompt is there before the first proposal."""
        if not self._pace.is_resting:
            self._survive(lambda: self._follow(table, slots), None)

    def propose_all(self, table: SeqTable, wanted: Sequence[Wanted]) -> list[Proposal]:
        num_worth = self._pace.num_worth()
        counts = {slot: min(most, num_worth) for slot, most in wanted if most > 0 and num_worth > 0}
        nothing: dict[int, list[int]] = {}
        found = self._survive(lambda: self._write(table, counts), nothing) if counts else nothing
        return [Proposal(found[slot]) if slot in found else NOTHING for slot, _ in wanted]

    def observe(self, proposal: Proposal, num_kept: int) -> None:
        super().observe(proposal, num_kept)
        if num_proposed := len(proposal.token_ids):
            self._pace.observe(num_kept, min(num_kept + 1, num_proposed))

    def _survive(self, work: Callable[[], T], otherwise: T) -> T:
        if self._is_dead:
            return otherwise
        try:
            return work()
        except RuntimeError:  # torch: out of memory, a kernel that fails
            if self._runner.num_ranks > 1:
                raise
            logger.exception("the model beneath the draft has failed: the draft goes on without it")
            self._is_dead = True
            return otherwise

    def _follow(self, table: SeqTable, slots: Sequence[int]) -> None:
        ends = [min(int(table.num_computed[slot]), self._max_model_len) for slot in slots]
        starts = [self._num_held(table, slot, end) for slot, end in zip(slots, ends, strict=True)]
        if spans := self._missing(table, slots, starts, ends):
            self._forward(table, spans)

    def _write(self, table: SeqTable, counts: dict[int, int]) -> dict[int, list[int]]:
        """Tokens after the history of each slot: as many as `counts` says, fewer where logits are not finite, none
        where too much of the history is missing."""
        counts = {slot: count for slot, count in counts.items() if table.lengths[slot] + count <= self._max_model_len}
        ends = [int(table.lengths[slot]) for slot in counts]
        # The last token goes through the model in any case, since what follows it is asked.
        starts = [min(end - 1, self._num_held(table, slot, end)) for slot, end in zip(counts, ends, strict=True)]
        spans = self._missing(table, list(counts), starts, ends)
        if not spans:
            return {}
        last_rows = np.cumsum([span.num_tokens for span in spans]) - 1
        there = [index for index, span in enumerate(spans) if span.start + span.num_tokens == table.lengths[span.slot]]
        hidden = self._forward(table, spans)
        found: dict[int, list[int]] = {spans[index].slot: [] for index in there}
        growing = list(found)
        hidden = hidden[upload(last_rows[there].tolist(), torch.int64, hidden.device)]
        while growing:
            self._choose(table, growing, found, hidden, min(counts[slot] - len(found[slot]) for slot in growing))
            growing = [slot for slot in growing if found[slot][-1] != NO_TOKEN and len(found[slot]) < counts[slot]]
            if growing:
                last = [_Span(slot, int(table.lengths[slot]) + len(found[slot]) - 1, 1) for slot in growing]
                hidden = self._forward(table, last)
        return {slot: self._known(token_ids) for slot, token_ids in found.items()}

    def _choose(
        self, table: SeqTable, slots: Sequence[int], found: dict[int, list[int]], hidden: Tensor, num_steps: int
    ) -> None:
        """Add up to `num_steps` tokens, one or more, to what was found for each slot, and NO_TOKEN where logits are not
        finite. hidden: [num_slots, hidden_size], of their last tokens."""
        lengths = {slot: int(table.lengths[slot]) + len(found[slot]) for slot in slots}
        steps = self._runner.draft(
            hidden,
            [RowEntry(table.sampling(slot), lengths[slot], tuple(found[slot])) for slot in slots],
            table.blocks(slots, max(lengths.values()) + num_steps - 1),
            num_steps=num_steps,
        )
        for sampled in steps:
            for slot, token_id in zip(slots, chosen_token_ids(sampled).tolist(), strict=True):
                found[slot].append(token_id)
        for slot in slots:
            table.put_drafts(slot, found[slot])
            self._note(table, _Span(slot, lengths[slot], len(steps) - 1))

    def _known(self, token_ids: list[int]) -> list[int]:
        """The first ones, as far as the draft knows them; its vocabulary may be smaller."""
        unknown = (i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self._limits.vocab_size)
        return token_ids[: next(unknown, len(token_ids))]

    def _missing(
        self, table: SeqTable, slots: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> list["_Span"]:
        """What a forward has room for; nothing of a seq with tokens that the model does not know."""
        room = self._limits.max_num_batched_tokens
        spans = []
        for slot, start, end in zip(slots, starts, ends, strict=True):
            count = min(end - start, room)
            if count > 0 and table.token_ids[slot, start : start + count].max() < self._vocab_size:
                spans.append(_Span(slot, start, count))
                room -= count
        return spans

    def _num_held(self, table: SeqTable, slot: int, end: int) -> int:
        """Leading tokens of the history whose KV is there."""
        num_blocks = -(-end // self._limits.block_size)
        held = self._held[table.block_table[slot, :num_blocks]].reshape(-1)[:end]
        differing = np.flatnonzero(held != table.token_ids[slot, :end])
        return int(differing[0]) if len(differing) else end

    def _forward(self, table: SeqTable, spans: Sequence["_Span"]) -> Tensor:  # [num_tokens, hidden_size]
        slots, starts, counts = zip(*spans, strict=True)
        hidden = self._runner.forward(table.pack_from(slots, starts, counts))
        for span in spans:
            self._note(table, span)
        return hidden

    def _note(self, table: SeqTable, span: "_Span") -> None:
        """These tokens have KV now. What blocks of the seq hold after them followed something else."""
        if not span.num_tokens:
            return
        size = self._limits.block_size
        positions = np.arange(span.start, span.start + span.num_tokens)
        blocks, places = table.block_table[span.slot, positions // size], positions % size
        self._held[blocks, places] = table.token_ids[span.slot, positions]
        self._held[blocks[-1], places[-1] + 1 :] = _NO_KV
        later = table.block_table[span.slot, positions[-1] // size + 1 : table.num_blocks[span.slot]]
        self._held[later] = _NO_KV


class _Span(NamedTuple):
    """Tokens of a seq that go through the model together."""

    slot: int
    start: int
    num_tokens: int
