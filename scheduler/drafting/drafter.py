"""What the draft engine does next, as far as both pipelines share it. `serial.py` and `continuous.py` hold the rest.

If the draft KV of a seq lags far behind, the draft catches up during the target's rounds, and the seq decodes without
drafts until then.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from echelon.pb import worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.chain import DraftSlot
from scheduler.drafting.row import DraftRow
from scheduler.drafting.slots import DraftSlots, is_complete
from scheduler.drafting.state import DraftState
from scheduler.drafting.verdict_cache import VerdictCache
from scheduler.engines.engine import EngineView, InFlight
from scheduler.engines.slot import Slot
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
        self.slots: DraftSlots | None = None
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
    def _plan_rows(self, slots: DraftSlots, speculating: list[DraftState]) -> list[DraftRow]:
        """The rows of the next round; none if the engine has enough to do or nothing pays. `speculating`: oldest
        first."""

    @abstractmethod
    def _on_answer(self, record: InFlight[DraftRow]) -> None:
        """A round has come back; its drafts are not taken in yet."""

    @abstractmethod
    def _observe_step(self, step_s: float) -> None:
        """A round that caught up with almost nothing took this long per step."""

    # -- seqs ---------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> EngineView[DraftRow] | None:
        return self.slots.engine if self.slots else None

    def attach(self, engine: EngineView[DraftRow], *, shares_process: bool) -> None:
        """`shares_process`: draft and target run in one process, so rounds of one wait for those of the other."""
        self.slots = DraftSlots(engine)
        self._shares_process = shares_process
        self.is_left_behind = False

    def detach(self) -> None:
        """The engine is gone and everything it held is lost. A seq that it computed each time goes on without it."""
        for seq in {row.seq for record in self.engine.in_flight for row in record.rows} if self.engine else ():
            if seq in self._states:
                self._states[seq].note_loss()
        self.slots = None
        self.is_left_behind = False
        self.cache.clear()
        for state in self._states.values():
            state.slot = state.fetch = None
            state.has_fetched = False
            state.forget_window()

    def prefetch(self, state: DraftState, now: float) -> None:
        """Begin to bring KV of the seq's prefix to the device, if it is known to other tiers."""
        if self.slots is not None and state.wants_draft_model:
            self.slots.prefetch(state, now)

    def release(self, state: DraftState) -> None:
        """The seq needs no more drafts: it has finished, was preempted or was given up."""
        if self.slots is not None:
            self._release_branches(state)
            self.slots.release(state)
        state.forget_window()

    def _give_up(self, state: DraftState) -> None:
        """The seq continues without drafts of this engine."""
        self.release(state)
        state.has_draft_model = False

    def on_commit(self, state: DraftState, token_ids: Sequence[int]) -> None:
        """These tokens joined the history."""
        if state.slot is not None and self.slots is not None and not self.slots.knows(token_ids):
            self._give_up(state)
        self.follow(state)

    def follow(self, state: DraftState) -> None:
        """After a commit or new drafts: compare chain and branches with the history."""
        slot = state.slot
        if slot is None or self.slots is None:
            return
        history, num_agreed, chain = state.seq.token_ids, slot.num_agreed, slot.chain[:]
        contradicted = slot.follow(history)
        num_accepted = slot.num_agreed - num_agreed
        self._num_of_use += num_accepted
        if self._asks_confidences:
            for index, drafted in enumerate(chain[: num_accepted + (contradicted is not None)]):
                self._calibration.observe(drafted.confidence, accepted=index < num_accepted)
        if contradicted is None:
            for dropped in self.cache.drop(state, before=len(history)):
                self.slots.engine.release(dropped)
            return
        start = slot.num_agreed
        foreseen = self.cache.resolve(state, contradicted, start, history[start])
        self._release_branches(state)
        if foreseen is not None and len(history) == start + 1:
            self.slots.engine.release(slot)
            state.slot = foreseen
        elif foreseen is not None:
            self.slots.engine.release(foreseen)

    @property
    def num_wasted(self) -> int:
        """Drafts that were not accepted and no longer can be."""
        undecided = 0
        for state in self._states.values():
            slots = [state.slot, *(branch.slot for branch in self.cache.branches(state))]
            undecided += sum(len(slot.chain) for slot in slots if slot is not None)
        return self.num_drafted - self._num_of_use - undecided

    def drafts_of(self, state: DraftState, *, may_hold: bool = True) -> Drafts:
        """What the policy needs to know about a seq."""
        seq, slot = state.seq, state.slot
        is_level = slot is not None and slot.num_agreed == len(seq.token_ids)
        return Drafts(
            acceptance=state.acceptance.rate,
            num_ready=len(slot.chain) if slot is not None and is_level else 0,
            num_coming=self._num_coming(state, slot),
            limit=state.limit,
            is_fixed=state.params.is_fixed,
            num_behind=slot.lag(seq.token_ids) if slot is not None else len(seq.token_ids),
            may_hold=may_hold,
        )

    def _num_coming(self, state: DraftState, slot: DraftSlot | None) -> int:
        """Drafts in flight, plus those of the next round."""
        if self.is_left_behind:
            return 0
        if slot is None or slot.is_catching_up or slot.lag(state.seq.token_ids) > self._tuning.max_lag:
            return 0
        if not self._grows(state):
            return slot.num_coming
        return max(slot.num_coming, min(state.window, state.limit) - len(slot.chain), 0)

    def may_bring(self, state: DraftState) -> bool:
        """Whether the seq may have drafts to verify when the target's current round comes back."""
        slot = state.slot
        if slot is None or self.is_left_behind:
            return False
        if slot.num_ahead or state.window:
            return True
        is_worth_it = state.params.is_fixed or not self.policy.is_resting
        return is_worth_it and slot.lag(state.seq.token_ids) <= self._tuning.max_lag

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
        if self.slots is None:
            return None
        self.slots.engine.expire_fetches(now)
        speculating = [state for state in running if state.wants_draft_model and self._may_follow(self.slots, state)]
        for state in speculating:
            self.slots.prefetch(state, now)  # the target may have had its part on the device
        if not speculating or not (rows := self._plan_rows(self.slots, speculating)):
            return None
        for row in rows:
            row.without_lower = not self._states[row.seq].params.has_lower
        return self.slots.engine.launch(
            rows,
            now,
            num_alternatives=self.cache.num_alternatives if self._config.verdict_cache_rows else 0,
            confidences=self._asks_confidences,
        )

    def on_result(self, result: worker_pb2.RoundResult, now: float, *, target_idle_since: float | None) -> None:
        """Take in a round's drafts. `target_idle_since`: None while it works. Raises UnexpectedAnswerError."""
        assert self.slots is not None, "a result of an engine that is not connected"
        record = self.slots.engine.complete(result, now)
        self.is_left_behind = False
        self._on_answer(record)
        was_alone = target_idle_since is not None and target_idle_since <= now - record.wall_s
        if not record.was_late:
            self._observe(record, beside_target=not was_alone)
        self.num_drafted += sum(len(answer.token_ids) for _, answer in record.answered)
        for row, answer in self.slots.take_in(record, self._odds):
            state = self._states[row.seq]
            if not is_complete(row, answer):
                self._on_missing_drafts(self.slots, state, row.slot, is_non_finite=answer.non_finite)
            elif state.slot is row.slot:
                self.follow(state)

    def _on_missing_drafts(self, slots: DraftSlots, state: DraftState, slot: Slot, *, is_non_finite: bool) -> None:
        if slot is not state.slot:
            slots.engine.release(self.cache.take(state, slot))
            return
        reason = "non-finite draft logits" if is_non_finite else "the draft engine gave fewer drafts than ordered"
        logger.warning("request %s: %s, going on without drafts", state.seq.request.request_id, reason)
        self._give_up(state)

    def _may_follow(self, slots: DraftSlots, state: DraftState) -> bool:
        if slots.has_room(len(state.seq.token_ids)):
            return True
        self._give_up(state)
        return False

    def _observe(self, record: InFlight[DraftRow], *, beside_target: bool) -> None:
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
        slot = state.slot
        assert slot is not None, "a seq that may draft has a slot"
        if state.window <= slot.num_ahead:
            return False
        if slot.num_coming and slot.num_agreed < len(state.seq.token_ids):
            return False  # drafts in flight first have to show whether the chain agrees
        if state.params.is_fixed or not self._config.adaptive or not slot.chain:
            return True
        rate = state.acceptance.rate
        return self.policy.should_extend(slot.survival * rate**slot.num_coming, rate)

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

    def _add(self, slots: DraftSlots, rows: list[DraftRow], state: DraftState, num_drafts: int, *, budget: int) -> int:
        """A row that drafts, if there is room for it. Returns the tokens of its chunk, at most `budget`."""
        row = slots.drafting_row(state, num_drafts) if num_drafts > 0 else None
        if row is None:
            state.window = min(state.window, state.num_ahead)  # the target must not wait for drafts that will not come
        elif row.chunk_len <= budget:
            slots.send(row)
            rows.append(row)
            return row.chunk_len
        return 0

    def _catch_up_rows(self, slots: DraftSlots, speculating: list[DraftState], budget: int) -> list[DraftRow]:
        rows: list[DraftRow] = []
        for state in speculating:
            seq, slot = state.seq, state.slot
            if slot is None or slot.is_catching_up or slot.num_ahead or budget < 1:
                continue
            if slot.lag(seq.token_ids) <= self._tuning.max_lag or state.target.is_verifying:
                continue
            if not state.params.is_fixed and not self.policy.pays_to_catch_up(
                num_seqs=len(speculating),
                num_behind=slot.lag(seq.token_ids),
                num_left=seq.max_len - len(seq.token_ids),
            ):
                continue
            row = slots.catch_up_row(state, budget)
            if row is not None:
                budget -= row.chunk_len
                slots.send(row)
                rows.append(row)
        return rows

    def _release_branches(self, state: DraftState) -> None:
        assert self.slots is not None, "branches live on an engine"
        for slot in self.cache.drop(state):
            self.slots.engine.release(slot)


def _may_be_overtaken(row: DraftRow) -> bool:
    """A row without results does not show whether it was computed."""
    return not row.num_draft_tokens and row.slot.is_released
