"""The continuous pipeline: the draft engine never stops for verdicts.

While the target verifies, it extends each chain up to a window ahead of the last commit. After a mismatch it restarts
from the commit. In extra rows of the same rounds it drafts for likely verdicts (verdict_cache.py). The policy decides
how long the target waits for drafts, if at all (`ContinuousPolicy`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.config import SpeculationConfig
from scheduler.drafting.branching import BranchPlanner
from scheduler.drafting.drafter import Drafter
from scheduler.drafting.row import DraftRow
from scheduler.drafting.slots import DraftSlots
from scheduler.drafting.state import DraftState
from scheduler.engines.engine import InFlight
from scheduler.policy.continuous import ContinuousPolicy
from scheduler.requests.request import Seq


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTuning:
    """Lengths of draft rounds. The scheduler decides how to continue when a round is answered, so rounds are short, but
    long compared with the time of a message."""

    max_steps: int = 4  # of a round; not measured
    round_s: float = 2e-3  # a round has as many steps as fit into this time; not measured
    step_share: float = 0.1  # weight of a new step time in the mean; not measured
    max_growing: int = 2  # rounds in flight: the second one runs while the answer to the first travels; not measured
    max_branching: int = 64  # seqs; with more, choosing branches takes longer than they save; not measured


class Continuous(Drafter):
    def __init__(
        self, config: SpeculationConfig, states: Mapping[Seq, DraftState], rounds: RoundTuning | None = None
    ) -> None:
        policy = ContinuousPolicy(
            max_drafts=config.num_speculative_tokens,
            adaptive=config.adaptive,
            window=config.window,
            has_branches=config.verdict_cache_rows > 0,
        )
        super().__init__(config, policy, states, asks_confidences=config.adaptive or config.verdict_cache_rows > 0)
        self._rounds = rounds or RoundTuning()
        self._step_s = self._rounds.round_s
        self._num_steps = 1  # of a round, at most
        self._branches = BranchPlanner(self.cache, policy)

    @property
    def target_waits(self) -> bool:
        return False  # seqs are held one by one, each until its own time

    def _on_answer(self, record: InFlight[DraftRow]) -> None:
        """Nothing waits for this round alone."""

    def _observe_step(self, step_s: float) -> None:
        self._step_s += self._rounds.step_share * (step_s - self._step_s)
        self._num_steps = max(1, min(self._rounds.max_steps, round(self._rounds.round_s / self._step_s)))

    def _plan_rows(self, slots: DraftSlots, speculating: list[DraftState]) -> list[DraftRow]:
        num_in_flight = len(slots.engine.in_flight)
        if num_in_flight > self._rounds.max_growing:
            return []
        slots.give_slots(speculating)
        drafting = [state for state in speculating if self._may_draft(state)]
        self._ask_policy(drafting)
        rows: list[DraftRow] = []
        budget = slots.engine.prompt_budget
        growing = [state for state in drafting if self._grows(state)]
        if num_in_flight == self._rounds.max_growing:
            # Only a restart is urgent: the engine need not compute what the restart overtakes.
            growing = [state for state in growing if state.slot is not None and state.slot.is_cut]
        elif self._config.verdict_cache_rows and len(drafting) <= self._rounds.max_branching:
            # Forks first: a fork copies what the slot holds before the round.
            rows += self._branches.rows(slots, drafting, growing, self._num_steps)
        budget -= sum(row.chunk_len for row in rows)
        for state in growing:
            budget -= self._add(slots, rows, state, self._num_missing(state), budget=budget)
        if num_in_flight < self._rounds.max_growing:
            others_draft = rows or num_in_flight
            rows += self._catch_up_rows(
                slots, speculating, budget // self._tuning.catch_up_share if others_draft else budget
            )
        return rows

    def _may_draft(self, state: DraftState) -> bool:
        slot = state.slot
        return (
            slot is not None
            and state.target.is_decoding
            and not slot.is_catching_up
            and slot.lag(state.seq.token_ids) <= self._tuning.max_lag
        )

    def _num_missing(self, state: DraftState) -> int:
        """How many drafts the next round should bring."""
        return max(0, min(state.window - state.num_ahead, self._num_steps))
