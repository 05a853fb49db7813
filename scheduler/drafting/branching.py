"""Which branches of the verdict cache grow in a round of the draft engine."""

from collections.abc import Sequence

from scheduler.drafting.chain import DraftSeat
from scheduler.drafting.seats import DraftSeats
from scheduler.drafting.state import DraftState
from scheduler.drafting.verdict_cache import Branch, Outcome, VerdictCache
from scheduler.engines.engine import PlannedRow
from scheduler.policy.policy import SpeculationPolicy


def _worth_of_next(state: DraftState) -> float:
    """The probability that the next draft of the seq's chain is accepted."""
    assert state.seat is not None, "a chain that grows has a seat"
    return state.seat.survival * state.acceptance.rate ** (1 + state.seat.num_coming)


class BranchPlanner:
    """Chooses branches by the value of their next draft: the probability that it will be committed."""

    def __init__(self, cache: VerdictCache, policy: SpeculationPolicy) -> None:
        self._cache = cache
        self._policy = policy

    def rows(
        self, seats: DraftSeats, drafting: Sequence[DraftState], growing: Sequence[DraftState], num_steps: int
    ) -> list[PlannedRow]:
        """Rows of at most `num_steps` drafts: as many rows as are worth the time that they add to the round.

        The chains of the seqs `growing` grow in any case. A branch of one of the seqs `drafting` has to gain more in
        the time of one more row than those chains gain in that time. If no chain grows, the branches must be worth a
        round of their own; otherwise nothing is drafted.
        """
        candidates = self._by_value(drafting, may_fork=seats.engine.num_free_slots > 0)
        if not growing and sum(value for value, _, _ in candidates) < self._policy.draft_step_cost:
            return []
        worth = sum(map(_worth_of_next, growing))
        step_s = self._policy.times.draft_step_s(len(growing)) if growing else 0.0
        longer_s = self._policy.times.draft_step_s(len(growing) + 1)
        rows: list[PlannedRow] = []
        for value, state, candidate in candidates:
            if value * step_s < worth * (longer_s - step_s):
                break
            row = self._row(seats, state, candidate, num_steps)
            if row is not None:
                seats.send(row, is_branch=True)
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
                if branch.seat.num_ahead < state.limit:
                    candidates.append((branch.probability * rate ** (1 + branch.seat.num_ahead), state, branch))
            if may_fork:
                candidates += [(each.probability * rate, state, each) for each in self._cache.likeliest(state)]
        return sorted(candidates, key=lambda candidate: -candidate[0])

    def _row(
        self, seats: DraftSeats, state: DraftState, candidate: Branch | Outcome, num_steps: int
    ) -> PlannedRow | None:
        if isinstance(candidate, Branch):
            missing = state.limit - candidate.seat.num_ahead
            return seats.branch_row(state.seq, candidate.seat, min(missing, num_steps))
        parent = state.seat
        assert parent is not None, "branches fork from a seat"
        row = seats.fork_row(state.seq, parent, candidate.start, candidate.token_id, num_steps)
        if row is not None:
            assert isinstance(row.seat, DraftSeat), "a fork has a draft seat"
            self._cache.add(state, Branch(candidate.start, candidate.token_id, candidate.probability, row.seat))
        return row
