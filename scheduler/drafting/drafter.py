"""What the draft engine does next: what both pipelines share. `serial.py` and `continuous.py` hold what they differ in.

In both a seq whose draft KV lags far behind is caught up beside the target's rounds and decodes without drafts until
then.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from echelon.pb import worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.chain import DraftSeat
from scheduler.drafting.seats import DraftSeats, is_complete
from scheduler.drafting.verdict_cache import VerdictCache
from scheduler.engines.engine import EngineView, InFlight, PlannedRow
from scheduler.policy.confidence import Calibration
from scheduler.policy.policy import Drafts, SpeculationPolicy
from scheduler.requests.request import Seq

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Of both pipelines."""

    max_lag: int = 32  # tokens that a drafting round may catch up on the way; not measured
    catch_up_share: int = 4  # of the token budget, 1 divided by it, while others draft; not measured


class Drafter(ABC):
    """Plans the rounds of the draft engine. Without an engine it plans none, and nobody has drafts.

    `asks_confidences`: for each draft, to tell where a chain is likely to end.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        policy: SpeculationPolicy,
        *,
        asks_confidences: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        self.policy = policy
        self._config = config
        self._tuning = tuning or Tuning()
        self.seats: DraftSeats | None = None
        self.cache = VerdictCache(config.verdict_cache_rows)
        self._calibration = Calibration()
        self._asks_confidences = asks_confidences
        self._served: Collection[Seq] = ()  # by another source, when last asked for a round
        self.num_drafted = 0
        self._num_of_use = 0  # drafts that the target wrote too

    # -- what the pipelines differ in ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def target_waits(self) -> bool:
        """For drafts, until a round has brought them."""

    @abstractmethod
    def _plan_rows(self, seats: DraftSeats, speculating: list[Seq]) -> list[PlannedRow]:
        """The rows of the next round; none: the engine has enough to do, or nothing pays. `speculating`: oldest
        first."""

    @abstractmethod
    def _on_landed(self, record: InFlight) -> None:
        """A round is back; its drafts are not taken in yet."""

    @abstractmethod
    def _observe_step(self, step_s: float) -> None:
        """A round that caught up with next to nothing took so long a step."""

    # -- seqs ---------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> EngineView | None:
        return self.seats.engine if self.seats else None

    def attach(self, engine: EngineView) -> None:
        self.seats = DraftSeats(engine)

    def detach(self, seqs: Iterable[Seq]) -> None:
        """The engine is gone with all that it held."""
        self.seats = None
        self.cache.clear()
        for seq in seqs:
            seq.draft = None
            seq.forget_window()

    def release(self, seq: Seq) -> None:
        """The seq drafts no more: finished, preempted or given up."""
        if self.seats is not None:
            self._release_branches(seq)
            self.seats.release(seq)
        seq.forget_window()

    def _give_up(self, seq: Seq) -> None:
        """The seq goes on without drafts of this engine."""
        self.release(seq)
        seq.has_draft_model = False

    def on_commit(self, seq: Seq, token_ids: Sequence[int]) -> None:
        """The history has grown by these tokens."""
        if seq.draft is not None and self.seats is not None and not self.seats.knows(token_ids):
            self._give_up(seq)
        self.follow(seq)

    def follow(self, seq: Seq) -> None:
        """Tokens were committed, or drafts have come: chain and branches are held against the history."""
        seat = seq.draft
        if seat is None or self.seats is None:
            return
        history, num_agreed, chain = seq.token_ids, seat.num_agreed, seat.chain[:]
        contradicted = seat.follow(history)
        num_accepted = seat.num_agreed - num_agreed
        self._num_of_use += num_accepted
        if self._asks_confidences:
            for index, drafted in enumerate(chain[: num_accepted + (contradicted is not None)]):
                self._calibration.observe(drafted.confidence, accepted=index < num_accepted)
        if contradicted is None:
            for dropped in self.cache.drop(seq, before=len(history)):
                self.seats.engine.release(dropped)
            return
        start = seat.num_agreed
        foreseen = self.cache.resolve(seq, contradicted, start, history[start])
        self._release_branches(seq)
        if foreseen is not None and len(history) == start + 1:
            self.seats.engine.release(seat)
            seq.draft = foreseen
        elif foreseen is not None:
            self.seats.engine.release(foreseen)

    def num_wasted(self, running: Iterable[Seq]) -> int:
        """Drafts that can no more be accepted, and were not."""
        undecided = 0
        for seq in running:
            seats = [seq.draft, *(branch.seat for branch in self.cache.branches(seq))]
            undecided += sum(len(seat.chain) for seat in seats if seat is not None)
        return self.num_drafted - self._num_of_use - undecided

    def drafts_of(self, seq: Seq, *, may_hold: bool = True) -> Drafts:
        """What the policy has to know of a seq."""
        seat = seq.draft
        is_level = seat is not None and seat.num_agreed == len(seq.token_ids)
        return Drafts(
            acceptance=seq.acceptance.rate,
            num_ready=len(seat.chain) if seat is not None and is_level else 0,
            num_coming=self._num_coming(seq, seat),
            limit=seq.draft_limit,
            is_fixed=seq.is_draft_fixed,
            num_behind=seat.lag(seq.token_ids) if seat is not None else len(seq.token_ids),
            may_hold=may_hold,
        )

    def _num_coming(self, seq: Seq, seat: DraftSeat | None) -> int:
        """Drafts that are on their way, or will be with the next round."""
        if seat is None or seat.is_catching_up or seat.lag(seq.token_ids) > self._tuning.max_lag:
            return 0
        if not self._grows(seq):
            return seat.num_coming
        return max(seat.num_coming, min(seq.window, seq.draft_limit) - len(seat.chain), 0)

    def may_bring(self, seq: Seq) -> bool:
        """The seq may have drafts to verify when the target's round on its way is back."""
        seat = seq.draft
        if seat is None:
            return False
        if seat.num_ahead or seq.window:
            return True
        return seat.lag(seq.token_ids) <= self._tuning.max_lag and (seq.is_draft_fixed or not self.policy.is_resting)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def plan(self, running: Iterable[Seq], now: float, *, served: Collection[Seq] = ()) -> worker_pb2.Round | None:
        """The next round for the draft engine, if it has one to run. `running`: oldest first; `served`: those for
        which another source promises more."""
        self._served = served
        if self.seats is None:
            return None
        speculating = [seq for seq in running if seq.wants_draft_model and self._may_follow(self.seats, seq)]
        if not speculating:
            return None
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
        """Take in a round's drafts. `target_idle_since`: None while it is at work. Raises UnexpectedAnswerError."""
        assert self.seats is not None, "a result of an engine that is not connected"
        record = self.seats.engine.land(result, now)
        self._on_landed(record)
        was_alone = target_idle_since is not None and target_idle_since <= now - record.wall_s
        self._observe(record, result, beside_target=not was_alone)
        self.num_drafted += sum(len(answer.token_ids) for answer in result.rows)
        for row, answer in self.seats.land(record, result, self._odds):
            if not is_complete(row, answer):
                self._on_missing_drafts(self.seats, row, is_non_finite=answer.non_finite)
            elif row.seq.draft is row.seat:
                self.follow(row.seq)

    def _on_missing_drafts(self, seats: DraftSeats, row: PlannedRow, *, is_non_finite: bool) -> None:
        seq = row.seq
        if row.seat is not seq.draft:
            seats.engine.release(self.cache.take(seq, row.seat))
            return
        reason = "non-finite draft logits" if is_non_finite else "the draft engine gave fewer drafts than ordered"
        logger.warning("request %s: %s, going on without drafts", seq.request.request_id, reason)
        self._give_up(seq)

    def _may_follow(self, seats: DraftSeats, seq: Seq) -> bool:
        if seats.has_room(len(seq.token_ids)):
            return True
        self._give_up(seq)
        return False

    def _observe(self, record: InFlight, result: worker_pb2.RoundResult, *, beside_target: bool) -> None:
        answered = zip(record.rows, result.rows, strict=True)
        computed = [row for row, answer in answered if answer.token_ids or not row.num_draft_tokens]
        if not computed or any(_may_be_overtaken(row) for row in computed):
            return
        num_chunk_tokens = sum(row.chunk_len + row.calibrate_len for row in computed)
        if result.num_steps and num_chunk_tokens <= 2 * len(computed):
            self._observe_step(record.wall_s / result.num_steps)
        self.policy.observe_draft(
            num_seqs=len(computed),
            num_steps=result.num_steps,
            num_chunk_tokens=num_chunk_tokens,
            run_s=record.wall_s,
            beside_target=beside_target,
        )

    def _grows(self, seq: Seq) -> bool:
        """The seq's chain deserves another draft."""
        seat = seq.draft
        assert seat is not None, "a seq that may draft has a seat"
        if seq.window <= seat.num_ahead:
            return False
        if seat.num_coming and seat.num_agreed < len(seq.token_ids):
            return False  # those on their way tell first whether the chain agrees
        if seq.is_draft_fixed or not self._config.adaptive or not seat.chain:
            return True
        rate = seq.acceptance.rate
        return self.policy.should_extend(seat.survival * rate**seat.num_coming, rate)

    def _odds(self, seq: Seq, confidence: float) -> float:
        """How likely a draft is accepted behind those before it."""
        rate = seq.acceptance.rate
        return self._calibration.rate(confidence, rate, self.policy.prior.rate) if self._asks_confidences else rate

    def _ask_policy(self, seqs: Sequence[Seq]) -> None:
        """How far each chain may run from now on; nothing new unless one of the seqs has got on."""
        if all(seq.window_chosen_at == len(seq.token_ids) for seq in seqs):
            return
        windows = self.policy.draft_lengths([self.drafts_of(seq) for seq in seqs])
        for seq, window in zip(seqs, windows, strict=True):
            seq.window = window
            seq.window_chosen_at = len(seq.token_ids)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _add(self, seats: DraftSeats, rows: list[PlannedRow], seq: Seq, num_drafts: int, *, budget: int) -> int:
        """A row that drafts, if there is room for it -> the tokens of its chunk, `budget` at most."""
        row = seats.drafting_row(seq, num_drafts) if num_drafts > 0 else None
        if row is None:
            seq.window = min(seq.window, seq.num_drafts_ahead)  # nobody is to wait for drafts that do not come
        elif row.chunk_len <= budget:
            seats.send(row)
            rows.append(row)
            return row.chunk_len
        return 0

    def _catch_up_rows(self, seats: DraftSeats, speculating: list[Seq], budget: int) -> list[PlannedRow]:
        rows: list[PlannedRow] = []
        for seq in speculating:
            seat = seq.draft
            if seat is None or seat.is_catching_up or seat.num_ahead or budget < 1:
                continue
            if seat.lag(seq.token_ids) <= self._tuning.max_lag or seq.is_verifying:
                continue
            if not seq.is_draft_fixed and not self.policy.pays_to_catch_up(
                num_seqs=len(speculating),
                num_behind=seat.lag(seq.token_ids),
                num_left=seq.max_len - len(seq.token_ids),
            ):
                continue
            row = seats.catch_up_row(seq, budget)
            if row is not None:
                budget -= row.chunk_len
                seats.send(row)
                rows.append(row)
        return rows

    def _release_branches(self, seq: Seq) -> None:
        assert self.seats is not None, "branches live on an engine"
        for seat in self.cache.drop(seq):
            self.seats.engine.release(seat)


def _may_be_overtaken(row: PlannedRow) -> bool:
    """A row that brings nothing does not show whether it was computed."""
    return not row.num_draft_tokens and row.seat.is_released
