"""Which branches of the verdict cache grow in a round of the draft engine."""

from collections.abc import Sequence

from scheduler.drafting.row import DraftRow
from scheduler.drafting.slots import DraftSlots
from scheduler.drafting.state import DraftState
from scheduler.drafting.verdict_cache import Branch, Outcome, VerdictCache
from scheduler.policy.policy import SpeculationPolicy


def _worth_of_next(state: DraftState) -> float:
    """The probability that the next draft of the seq's chain is accepted."""
    assert state.slot is not None, "a chain that grows has a slot"
    return state.slot.survival * state.acceptance.rate ** (1 + state.slot.num_coming)


class BranchPlanner:
    """Chooses branches by the value of their next draft: the probability that it will be committed."""

    def __init__(self, cache: VerdictCache, policy: SpeculationPolicy) -> None:
        self._cache = cache
        self._policy = policy

    def rows(
        self, slots: DraftSlots, drafting: Sequence[DraftState], growing: Sequence[DraftState], num_steps: int
    ) -> list[DraftRow]:
        """Rows of at most `num_steps` drafts: as many rows as are worth the time that they add to the round.

        The chains of the seqs `growing` grow in any case. A branch of one of the seqs `drafting` has to gain more in
        the time of one more row than those chains gain in that time. If no chain grows, the branches must be worth a
        round of their own; otherwise nothing is drafted.
        """
        candidates = self._by_value(drafting, may_fork=slots.engine.num_free_slots > 0)
        if not growing and sum(value for value, _, _ in candidates) < self._policy.draft_step_cost:
            return []
        worth = sum(map(_worth_of_next, growing))
        step_s = self._policy.times.draft_step_s(len(growing)) if growing else 0.0
        longer_s = self._policy.times.draft_step_s(len(growing) + 1)
        rows: list[DraftRow] = []
        for value, state, candidate in candidates:
            if value * step_s < worth * (longer_s - step_s):
                break
            row = self._row(slots, state, candidate, num_steps)
            if row is not None:
                slots.send(row, is_branch=True)
                rows.append(row)
                worth += value
                step_s, longer_s = longer_s, self._policy.times.draft_step_s(len(growing) + len(rows) + 1)
        return rows

    def _by_value(
        self, drafting: Sequence[DraftState], *, may_fork: bool
    ) -> list[tuple[float, DraftState, Branch | Outcome]]:
        """Branches that could grow and, if there are slots, outcomes that could get one."""
        candidates: list[tuple[float, DraftState, Branch | Outcome]] = []
        for state in drafting:
            if state.window == 0 or not state.target.is_verifying:
                continue
            rate = state.acceptance.rate
            for branch in self._cache.branches(state):
                if branch.slot.num_ahead < state.limit:
                    candidates.append((branch.probability * rate ** (1 + branch.slot.num_ahead), state, branch))
            if may_fork:
                candidates += [(each.probability * rate, state, each) for each in self._cache.likeliest(state)]
        return sorted(candidates, key=lambda candidate: -candidate[0])

    def _row(
        self, slots: DraftSlots, state: DraftState, candidate: Branch | Outcome, num_steps: int
    ) -> DraftRow | None:
        if isinstance(candidate, Branch):
            missing = state.limit - candidate.slot.num_ahead
            return slots.branch_row(state.seq, candidate.slot, min(missing, num_steps))
        parent = state.slot
        assert parent is not None, "branches fork from a slot"
        row = slots.fork_row(state.seq, parent, candidate.start, candidate.token_id, num_steps)
        if row is not None:
            self._cache.add(state, Branch(candidate.start, candidate.token_id, candidate.probability, row.slot))
        return row
