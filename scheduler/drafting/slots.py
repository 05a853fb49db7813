"""The seqs that have a place on the draft engine, and the rows that bring them up to date and extend their chains.

Everything here is best effort: no seq waits for slots or blocks of the draft engine. A seq that does not fit continues
without drafts.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from echelon.pb import worker_pb2
from scheduler.drafting.chain import Drafted, DraftSlot
from scheduler.drafting.row import DraftRow, ForkFrom
from scheduler.drafting.state import DraftState
from scheduler.engines.engine import EngineView, InFlight, NoRoomError
from scheduler.requests.request import Seq


class DraftSlots:
    """Slots of one draft engine; created anew when the engine reconnects."""

    def __init__(self, engine: EngineView[DraftRow]) -> None:
        self.engine = engine
        self._is_approximate = engine.info.lp_size > 1  # drafts leave KV that needs calibration

    def prefetch(self, state: DraftState, now: float) -> None:
        """Begin to bring the known start of the seq's history to the device; its slot waits for it."""
        if state.slot is not None or state.has_fetched:
            return
        state.has_fetched = True
        with contextlib.suppress(NoRoomError):
            state.fetch = self.engine.fetch(state.seq, now, num_spare=1, takes_part=False)

    def give_slots(self, states: Iterable[DraftState]) -> None:
        """Give a slot to each seq that has none, as long as there are slots. `states`: oldest first."""
        for state in states:
            if state.slot is not None or (state.fetch is not None and not state.fetch.is_over):
                continue
            if self.engine.num_free_slots == 0:
                return
            if state.num_free_at_refusal != self.engine.blocks.num_free and not self._give_slot(state):
                state.num_free_at_refusal = self.engine.blocks.num_free

    def has_room(self, num_tokens: int) -> bool:
        """Whether this many tokens and a draft fit into the draft's context, which may be shorter than the target's."""
        return num_tokens < self.engine.info.max_model_len

    def knows(self, token_ids: Iterable[int]) -> bool:
        """Whether all token ids are in the draft's vocabulary; the target's padding may reach beyond it."""
        return max(token_ids, default=0) < self.engine.info.vocab_size

    def release(self, state: DraftState) -> None:
        self._leave_fetch(state)
        if state.slot is not None:
            self.engine.release(state.slot)
            state.slot = None

    def _leave_fetch(self, state: DraftState) -> None:
        if state.fetch is not None and self.engine.tiers is not None:
            self.engine.tiers.fetching.leave(state.fetch)
        state.fetch = None
        state.has_fetched = False

    def _give_slot(self, state: DraftState) -> bool:
        """Allocate blocks for the whole history at once, so that catching up never gets stuck halfway."""
        seq, blocks = state.seq, self.engine.blocks
        found = self.engine.find_prefix(seq)
        most = min(seq.max_len, self.engine.info.max_model_len)
        num_new = blocks.num_blocks_for(min(len(seq.token_ids) + state.params.max_drafts, most)) - len(found)
        if num_new + blocks.num_idle_among(found) > blocks.num_free:
            return False
        if not self.knows(seq.token_ids):
            state.has_draft_model = False
            return False
        self.engine.take_prefix(seq, found)
        self._leave_fetch(state)
        num_found = len(found) * blocks.block_size
        state.slot = DraftSlot(
            index=self.engine.take_slot(),
            block_ids=found + blocks.allocate(num_new, found[-1] if found else None),
            num_computed=num_found,
            num_published=len(found),
            num_agreed=num_found,
            num_exact=num_found,
        )
        return True

    # -- rows ---------------------------------------------------------------------------------------------------------

    def drafting_row(self, state: DraftState, num_drafts: int) -> DraftRow | None:
        """The seq's chain, first brought up to the history if necessary, grows by up to `num_drafts` > 0 tokens."""
        slot = state.slot
        assert slot is not None, "a seq without a slot cannot draft"
        row = self._row(state.seq, slot)
        num_drafts = self._room_for_drafts(state.seq, slot, row.end, num_drafts)
        if num_drafts < 1:
            return None
        row.num_draft_tokens = num_drafts
        return row

    def catch_up_row(self, state: DraftState, num_tokens: int) -> DraftRow | None:
        """Compute up to `num_tokens` of the history. Its last token is left for the row that drafts after it."""
        slot = state.slot
        assert slot is not None, "a seq without a slot cannot catch up"
        row = self._row(state.seq, slot)
        row.chunk_len = min(row.chunk_len - 1, num_tokens)
        if row.chunk_len < 1 or not self.engine.grow(slot, row.end):
            return None
        return row

    def branch_row(self, seq: Seq, slot: DraftSlot, num_drafts: int) -> DraftRow | None:
        """An existing branch grows."""
        num_drafts = self._room_for_drafts(seq, slot, slot.num_held, num_drafts)
        if num_drafts < 1:
            return None
        chunk_len = slot.num_held - slot.num_computed
        return DraftRow(seq=seq, slot=slot, start=slot.num_computed, chunk_len=chunk_len, num_draft_tokens=num_drafts)

    def fork_row(self, seq: Seq, parent: DraftSlot, length: int, token_id: int, num_drafts: int) -> DraftRow | None:
        """A new branch: the first `length` tokens that `parent` holds, then `token_id`, then drafts."""
        blocks = self.engine.blocks
        num_drafts = min(num_drafts, self._most_drafts(seq, length + 1))
        num_shared = length // blocks.block_size
        num_new = blocks.num_blocks_for(length + num_drafts) - num_shared
        if num_drafts < 1 or self.engine.num_free_slots == 0 or num_new > blocks.num_free:
            return None
        shared = parent.block_ids[:num_shared]
        blocks.hold(shared)
        start = min(parent.num_computed, length)
        slot = DraftSlot(
            index=self.engine.take_slot(),
            block_ids=shared + blocks.allocate(num_new),
            num_computed=start,
            num_published=min(parent.num_published, num_shared),
            num_agreed=length + 1,
            num_exact=min(parent.num_exact, start),
        )
        return DraftRow(
            seq=seq,
            slot=slot,
            start=start,
            chunk_len=length + 1 - start,
            append_token_ids=[token_id],
            fork=ForkFrom(parent.index, length, num_shared),
            num_draft_tokens=num_drafts,
        )

    def send(self, row: DraftRow, *, is_branch: bool = False) -> None:
        """The row goes with the next round. Its slot moves to the state after the row."""
        slot = row.slot
        end = row.end
        slot.num_exact += row.calibrate_len
        goes_on = slot.ends_in_draft and not row.append_token_ids
        if not goes_on and row.start == slot.num_exact:
            slot.num_exact = end  # computed by the exact model, on exact KV
        slot.ends_in_draft = goes_on or row.num_draft_tokens > 0
        if not is_branch:
            if slot.num_ahead == 0:
                slot.num_agreed = len(row.seq.token_ids)
            row.num_exact = min(slot.num_exact if self._is_approximate else end, slot.num_agreed)
        slot.is_cut = False
        slot.is_catching_up = row.num_draft_tokens == 0
        slot.num_coming += row.num_draft_tokens
        row.epoch = slot.epoch

    def _row(self, seq: Seq, slot: DraftSlot) -> DraftRow:
        """Tokens to compute before the chain can grow: only its own last token if the chain agrees so far."""
        history = seq.token_ids
        is_behind = slot.num_agreed < len(history)
        assert not (is_behind and slot.num_ahead), "rows in flight first have to show whether the chain agrees"
        start = min(slot.num_computed, slot.num_agreed) if is_behind else slot.num_computed
        return DraftRow(
            seq=seq,
            slot=slot,
            start=start,
            chunk_len=(len(history) if is_behind else slot.num_held) - start,
            crop_len=slot.num_agreed if slot.is_cut else None,
            append_token_ids=history[slot.num_agreed :] if is_behind and slot.introduced else (),
            calibrate_len=max(0, min(start, slot.num_agreed) - slot.num_exact) if self._is_approximate else 0,
        )

    def _room_for_drafts(self, seq: Seq, slot: DraftSlot, num_held: int, wanted: int) -> int:
        """How many drafts fit after `num_held` tokens, with blocks for them; 0 if none."""
        # The last draft is not computed and needs no slot in a block.
        num_drafts = min(wanted, self._most_drafts(seq, num_held), self.engine.room_for(slot) - num_held + 1)
        if num_drafts < 1 or not self.engine.grow(slot, num_held + num_drafts - 1):
            return 0
        return num_drafts

    def _most_drafts(self, seq: Seq, num_held: int) -> int:
        """Drafts after `num_held` tokens that could still be accepted: the target adds a token of its own to them."""
        return min(seq.max_len - 1, self.engine.info.max_model_len) - num_held

    # -- results ------------------------------------------------------------------------------------------------------

    def take_in(
        self, record: InFlight[DraftRow], odds: Callable[[Seq, float], float]
    ) -> Iterator[tuple[DraftRow, worker_pb2.RowResult]]:
        """Take in a round's drafts. Yields the rows whose chains continue, with their answers. A row that lacks drafts
        (`is_complete`) leaves its slot as it was; that slot is useless from then on. `odds`: the probability that a
        draft of this seq with this confidence is accepted."""
        for row, answer in record.answered:
            slot = row.slot
            if slot.is_released or row.epoch != slot.epoch:
                continue  # it may not even have been computed: see Row in worker.proto
            if is_complete(row, answer):
                slot.is_catching_up = False
                self.engine.publish(row.seq, slot, row.num_exact)
                slot.extend(row.num_draft_tokens, _drafted(row.seq, answer, odds))
            else:
                self.engine.unpublish(slot)
            yield row, answer


def is_complete(row: DraftRow, answer: worker_pb2.RowResult) -> bool:
    """Whether the draft engine did everything that the row ordered."""
    return not answer.non_finite and len(answer.token_ids) == row.num_draft_tokens


def _drafted(seq: Seq, answer: worker_pb2.RowResult, odds: Callable[[Seq, float], float]) -> Sequence[Drafted]:
    token_ids = answer.token_ids
    if not token_ids:
        return ()
    width = len(answer.alternative_token_ids) // len(token_ids)
    alternatives = list(answer.alternative_token_ids)
    confidences = answer.confidences or [1.0] * len(token_ids)
    return [
        Drafted(token_id, tuple(alternatives[i * width : (i + 1) * width]), confidence, odds(seq, confidence))
        for i, (token_id, confidence) in enumerate(zip(token_ids, confidences, strict=True))
    ]
