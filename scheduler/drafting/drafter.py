"""What the draft engine does next, as far as both pipelines share it. `serial.py` and `continuous.py` hold the rest.

If the draft KV of a seq lags far behind, the draft catches up beside the target's rounds, and the seq decodes without
drafts until then.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from echelon.pb import worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.chain import DraftSeat
from scheduler.drafting.seats import DraftSeats, is_complete
from scheduler.drafting.state import DraftState
from scheduler.drafting.verdict_cache import VerdictCache
from scheduler.engines.engine import EngineView, InFlight, PlannedRow
from scheduler.engines.seat import Seat
from scheduler.policy.confidence import Calibration
from scheduler.policy.policy import Drafts, SpeculationPolicy
from scheduler.requests.request import Seq

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Of both pipelines."""

    max_lag: int = 32  # tokens that a drafting round may also catch up with; not measured
    catch_up_share: int = 4  # while others draft, catching up gets the token budget divided by this; not measured


class Drafter(ABC):
    """Plans the rounds of the draft engine. Without an engine it plans none, and no seq has drafts.

    `states`: of all seqs that have not ended. `asks_confidences`: ask for the confidence of each draft, which tells
    where a chain is likely to end.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        policy: SpeculationPolicy,
        states: Mapping[Seq, DraftState],
        *,
        asks_confidences: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        self.policy = policy
        self._config = config
        self._states = states
        self._tuning = tuning or Tuning()
        self.seats: DraftSeats | None = None
        self.cache = VerdictCache(config.verdict_cache_rows)
        self._calibration = Calibration()
        self._asks_confidences = asks_confidences
        self._served: Collection[DraftState] = ()  # seqs served by another source at the last call of plan
        self._shares_process = False
        self.is_left_behind = False  # a round is late: the target continues without it until it comes back
        self.num_drafted = 0
        self._num_of_use = 0  # drafts that equalled the target's choice

    # -- what the pipelines differ in ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def target_waits(self) -> bool:
        """Whether the target waits until a round has brought drafts."""

    @abstractmethod
    def _plan_rows(self, seats: DraftSeats, speculating: list[DraftState]) -> list[PlannedRow]:
        """The rows of the next round; none if the engine has enough to do or nothing pays. `speculating`: oldest
        first."""

    @abstractmethod
    def _on_landed(self, record: InFlight) -> None:
        """A round has come back; its drafts are not taken in yet."""

    @abstractmethod
    def _observe_step(self, step_s: float) -> None:
        """A round that caught up with almost nothing took this long per step."""

    # -- seqs ---------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> EngineView | None:
        return self.seats.engine if self.seats else None

    def attach(self, engine: EngineView, *, shares_process: bool) -> None:
        """`shares_process`: draft and target run in one process, so rounds of one wait for those of the other."""
        self.seats = DraftSeats(engine)
        self._shares_process = shares_process
        self.is_left_behind = False

    def detach(self) -> None:
        """The engine is gone and everything it held is lost."""
        self.seats = None
        self.is_left_behind = False
        self.cache.clear()
        for state in self._states.values():
            state.seat = state.fetch = None
            state.has_fetched = False
            state.forget_window()

    def prefetch(self, state: DraftState, now: float) -> None:
        """Begin to bring KV of the seq's prefix to the device, if it is known to other tiers."""
        if self.seats is not None and state.wants_draft_model:
            self.seats.prefetch(state, now)

    def release(self, state: DraftState) -> None:
        """The seq needs no more drafts: it has finished, was preempted or was given up."""
        if self.seats is not None:
            self._release_branches(state)
            self.seats.release(state)
        state.forget_window()

    def _give_up(self, state: DraftState) -> None:
        """The seq continues without drafts of this engine."""
        self.release(state)
        state.has_draft_model = False

    def on_commit(self, state: DraftState, token_ids: Sequence[int]) -> None:
        """These tokens joined the history."""
        if state.seat is not None and self.seats is not None and not self.seats.knows(token_ids):
            self._give_up(state)
        self.follow(state)

    def follow(self, state: DraftState) -> None:
        """After a commit or new drafts: compare chain and branches with the history."""
        seat = state.seat
        if seat is None or self.seats is None:
            return
        history, num_agreed, chain = state.seq.token_ids, seat.num_agreed, seat.chain[:]
        contradicted = seat.follow(history)
        num_accepted = seat.num_agreed - num_agreed
        self._num_of_use += num_accepted
        if self._asks_confidences:
            for index, drafted in enumerate(chain[: num_accepted + (contradicted is not None)]):
                self._calibration.observe(drafted.confidence, accepted=index < num_accepted)
        if contradicted is None:
            for dropped in self.cache.drop(state, before=len(history)):
                self.seats.engine.release(dropped)
            return
        start = seat.num_agreed
        foreseen = self.cache.resolve(state, contradicted, start, history[start])
        self._release_branches(state)
        if foreseen is not None and len(history) == start + 1:
            self.seats.engine.release(seat)
            state.seat = foreseen
        elif foreseen is not None:
            self.seats.engine.release(foreseen)

    @property
    def num_wasted(self) -> int:
        """Drafts that were not accepted and no longer can be."""
        undecided = 0
        for state in self._states.values():
            seats = [state.seat, *(branch.seat for branch in self.cache.branches(state))]
            undecided += sum(len(seat.chain) for seat in seats if seat is not None)
        return self.num_drafted - self._num_of_use - undecided

    def drafts_of(self, state: DraftState, *, may_hold: bool = True) -> Drafts:
        """What the policy needs to know about a seq."""
        seq, seat = state.seq, state.seat
        is_level = seat is not None and seat.num_agreed == len(seq.token_ids)
        return Drafts(
            acceptance=state.acceptance.rate,
            num_ready=len(seat.chain) if seat is not None and is_level else 0,
            num_coming=self._num_coming(state, seat),
            limit=state.limit,
            is_fixed=state.wish.is_fixed,
            num_behind=seat.lag(seq.token_ids) if seat is not None else len(seq.token_ids),
            may_hold=may_hold,
        )

    def _num_coming(self, state: DraftState, seat: DraftSeat | None) -> int:
        """Drafts in flight, plus those of the next round."""
        if self.is_left_behind:
            return 0
        if seat is None or seat.is_catching_up or seat.lag(state.seq.token_ids) > self._tuning.max_lag:
            return 0
        if not self._grows(state):
            return seat.num_coming
        return max(seat.num_coming, min(state.window, state.limit) - len(seat.chain), 0)

    def may_bring(self, state: DraftState) -> bool:
        """Whether the seq may have drafts to verify when the target's current round comes back."""
        seat = state.seat
        if seat is None or self.is_left_behind:
            return False
        if seat.num_ahead or state.window:
            return True
        is_level = seat.lag(state.seq.token_ids) <= self._tuning.max_lag
        return is_level and (state.wish.is_fixed or not self.policy.is_resting)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def late_at(self, target_idle_since: float | None) -> float:
        """When the oldest round in flight becomes late; inf if none is. `target_idle_since`: None while it works."""
        if self.engine is None or (self._shares_process and target_idle_since is None):
            return inf
        return self.engine.late_at(target_idle_since if self._shares_process and target_idle_since else -inf)

    def plan(
        self, running: Iterable[DraftState], now: float, *, served: Collection[DraftState] = ()
    ) -> worker_pb2.Round | None:
        """The next round for the draft engine, None if there is none. `running`: oldest first; `served`: those for
        which another source promises more."""
        self._served = served
        if self.seats is None:
            return None
        self.seats.engine.expire_fetches(now)
        speculating = [state for state in running if state.wants_draft_model and self._may_follow(self.seats, state)]
        if not speculating:
            return None
        for state in speculating:
            self.seats.prefetch(state, now)  # the target may have had its part on the device
        rows = self._plan_rows(self.seats, speculating)
        if not rows:
            return None
        return self.seats.engine.launch(
            rows,
            now,
            num_alternatives=self.cache.num_alternatives if self._config.verdict_cache_rows else 0,
            confidences=self._asks_confidences,
        )

    def on_result(self, result: worker_pb2.RoundResult, now: float, *, target_idle_since: float | None) -> None:
        """Take in a round's drafts. `target_idle_since`: None while it works. Raises UnexpectedAnswerError."""
        assert self.seats is not None, "a result of an engine that is not connected"
        record = self.seats.engine.land(result, now)
        self.is_left_behind = False
        self._on_landed(record)
        was_alone = target_idle_since is not None and target_idle_since <= now - record.wall_s
        if not record.was_late:
            self._observe(record, beside_target=not was_alone)
        self.num_drafted += sum(len(answer.token_ids) for _, answer in record.answered)
        for row, answer in self.seats.land(record, self._odds):
            state = self._states[row.seq]
            if not is_complete(row, answer):
                self._on_missing_drafts(self.seats, state, row.seat, is_non_finite=answer.non_finite)
            elif state.seat is row.seat:
                self.follow(state)

    def _on_missing_drafts(self, seats: DraftSeats, state: DraftState, seat: Seat, *, is_non_finite: bool) -> None:
        if seat is not state.seat:
            seats.engine.release(self.cache.take(state, seat))
            return
        reason = "non-finite draft logits" if is_non_finite else "the draft engine gave fewer drafts than ordered"
        logger.warning("request %s: %s, going on without drafts", state.seq.request.request_id, reason)
        self._give_up(state)

    def _may_follow(self, seats: DraftSeats, state: DraftState) -> bool:
        if seats.has_room(len(state.seq.token_ids)):
            return True
        self._give_up(state)
        return False

    def _observe(self, record: InFlight, *, beside_target: bool) -> None:
        computed = [row for row, answer in record.answered if answer.token_ids or not row.num_draft_tokens]
        if not computed or any(_may_be_overtaken(row) for row in computed):
            return
        num_chunk_tokens = sum(row.chunk_len + row.calibrate_len for row in computed)
        if record.num_steps and num_chunk_tokens <= 2 * len(computed):
            self._observe_step(record.wall_s / record.num_steps)
        self.policy.observe_draft(
            num_seqs=len(computed),
            num_steps=record.num_steps,
            num_chunk_tokens=num_chunk_tokens,
            run_s=record.wall_s,
            beside_target=beside_target,
        )

    def _grows(self, state: DraftState) -> bool:
        """Whether the seq's chain is worth another draft."""
        seat = state.seat
        assert seat is not None, "a seq that may draft has a seat"
        if state.window <= seat.num_ahead:
            return False
        if seat.num_coming and seat.num_agreed < len(state.seq.token_ids):
            return False  # drafts in flight first have to show whether the chain agrees
        if state.wish.is_fixed or not self._config.adaptive or not seat.chain:
            return True
        rate = state.acceptance.rate
        return self.policy.should_extend(seat.survival * rate**seat.num_coming, rate)

    def _odds(self, seq: Seq, confidence: float) -> float:
        """The probability that a draft is accepted if all before it are."""
        rate = self._states[seq].acceptance.rate
        return self._calibration.rate(confidence, rate, self.policy.prior.rate) if self._asks_confidences else rate

    def _ask_policy(self, states: Sequence[DraftState]) -> None:
        """Choose how far each chain may run from now on. The windows stay as they are unless a seq has advanced."""
        if all(state.window_chosen_at == len(state.seq.token_ids) for state in states):
            return
        windows = self.policy.draft_lengths([self.drafts_of(state) for state in states])
        for state, window in zip(states, windows, strict=True):
            state.window = window
            state.window_chosen_at = len(state.seq.token_ids)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _add(
        self, seats: DraftSeats, rows: list[PlannedRow], state: DraftState, num_drafts: int, *, budget: int
    ) -> int:
        """A row that drafts, if there is room for it. Returns the tokens of its chunk, at most `budget`."""
        row = seats.drafting_row(state, num_drafts) if num_drafts > 0 else None
        if row is None:
            state.window = min(state.window, state.num_ahead)  # the target must not wait for drafts that will not come
        elif row.chunk_len <= budget:
            seats.send(row)
            rows.append(row)
            return row.chunk_len
        return 0

    def _catch_up_rows(self, seats: DraftSeats, speculating: list[DraftState], budget: int) -> list[PlannedRow]:
        rows: list[PlannedRow] = []
        for state in speculating:
            seq, seat = state.seq, state.seat
            if seat is None or seat.is_catching_up or seat.num_ahead or budget < 1:
                continue
            if seat.lag(seq.token_ids) <= self._tuning.max_lag or state.target.is_verifying:
                continue
            if not state.wish.is_fixed and not self.policy.pays_to_catch_up(
                num_seqs=len(speculating),
                num_behind=seat.lag(seq.token_ids),
                num_left=seq.max_len - len(seq.token_ids),
            ):
                continue
            row = seats.catch_up_row(state, budget)
            if row is not None:
                budget -= row.chunk_len
                seats.send(row)
                rows.append(row)
        return rows

    def _release_branches(self, state: DraftState) -> None:
        assert self.seats is not None, "branches live on an engine"
        for seat in self.cache.drop(state):
            self.seats.engine.release(seat)


def _may_be_overtaken(row: PlannedRow) -> bool:
    """A row without results does not show whether it was computed."""
    return not row.num_draft_tokens and row.seat.is_released
