"""The serial pipeline: the draft engine drafts for every seq that is about to be verified, and the target waits."""

from collections.abc import Collection, Iterable, Mapping

from echelon.pb import worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.drafter import Drafter
from scheduler.drafting.row import DraftRow
from scheduler.drafting.slots import DraftSlots
from scheduler.drafting.state import DraftState
from scheduler.engines.engine import InFlight
from scheduler.engines.slot import Slot
from scheduler.policy.serial import SerialPolicy
from scheduler.requests.request import Seq


class Serial(Drafter):
    def __init__(self, config: SpeculationConfig, states: Mapping[Seq, DraftState]) -> None:
        policy = SerialPolicy(max_drafts=config.num_speculative_tokens, adaptive=config.adaptive)
        super().__init__(config, policy, states)
        self._drafting: set[Slot] = set()  # slots whose drafts are in flight
        self._is_gathering = False  # the round that will bring those drafts has not been sent yet

    @property
    def target_waits(self) -> bool:
        return (bool(self._drafting) or self._is_gathering) and not self.is_left_behind

    def detach(self) -> None:
        self._drafting.clear()
        self._is_gathering = False
        super().detach()

    def release(self, state: DraftState) -> None:
        if state.slot is not None:
            self._drafting.discard(state.slot)
        super().release(state)

    def plan(
        self, running: Iterable[DraftState], now: float, *, served: Collection[DraftState] = ()
    ) -> worker_pb2.Round | None:
        self._is_gathering = False
        return super().plan(running, now, served=served)

    def _on_answer(self, record: InFlight[DraftRow]) -> None:
        self._drafting.difference_update(row.slot for row in record.rows)

    def _observe_step(self, step_s: float) -> None:
        """A round has as many steps as drafts were ordered."""

    def _plan_rows(self, slots: DraftSlots, speculating: list[DraftState]) -> list[DraftRow]:
        # A drafting round may be queued after one that catches up.
        if self._drafting or len(slots.engine.in_flight) >= 2:
            return []
        slots.give_slots(speculating)
        due = [state for state in speculating if self._is_due(state)]
        ready = [state for state in due if state.slot is not None and not state.slot.is_catching_up]
        self._ask_policy(ready)
        if len(ready) < len(due) and any(state.window > state.num_ahead for state in ready):
            # The others catch up in a round that runs before any new one, so that one round then drafts for all.
            self._is_gathering = True
            return []
        rows: list[DraftRow] = []
        budget = slots.engine.prompt_budget
        for state in ready:
            state.num_drafted_at = len(state.seq.token_ids)
            budget -= self._add(slots, rows, state, state.window - state.num_ahead, budget=budget)
        self._drafting.update(row.slot for row in rows)
        if not rows and not slots.engine.in_flight:
            budget = slots.engine.prompt_budget
            if any(state.slot is not None and state.slot.chain for state in speculating):
                budget //= self._tuning.catch_up_share  # some seq will want to draft when the target comes back
            rows = self._catch_up_rows(slots, speculating, budget)
        return rows

    def _is_due(self, state: DraftState) -> bool:
        """Whether the seq only has to decode, and no drafts were ordered for this position. The draft has caught up
        with it, or will have after a round in flight."""
        seq, slot = state.seq, state.slot
        return (
            state.target.num_rows_in_flight == 0
            and state.target.is_decoding
            and state not in self._served
            and state.num_drafted_at != len(seq.token_ids)
            and slot is not None
            and slot.lag(seq.token_ids) <= self._tuning.max_lag
        )
