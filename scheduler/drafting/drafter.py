"""What the draft engine does next.

`serial`: the draft engine drafts for every seq that is about to be verified, and the target waits for it.
`continuous`: it keeps extending each chain up to a window ahead of the last commit while the target verifies, restarts
from the commit on a mismatch, and drafts behind likely verdicts (verdict_cache.py) in extra rows of the same rounds.

In both a seq whose draft KV lags far behind is caught up beside the target's rounds and decodes without drafts until
then.
"""

import logging
from collections.abc import Iterable, Sequence

from echelon.pb import worker_pb2
from scheduler.config import Pipeline, SpeculationConfig
from scheduler.drafting.branching import BranchPlanner
from scheduler.drafting.chain import DraftSeat
from scheduler.drafting.seats import DraftSeats, is_complete
from scheduler.drafting.verdict_cache import VerdictCache
from scheduler.engines.engine import Engine, InFlight, PlannedRow
from scheduler.engines.seat import Seat
from scheduler.policy.confidence import Calibration
from scheduler.policy.policy import Drafts, SpeculationPolicy
from scheduler.requests.seq import Seq

__all__ = ["Drafter"]

logger = logging.getLogger(__name__)

_MAX_LAG = 32  # tokens that a drafting round may catch up on the way
_MAX_STEPS = 4  # of a round of the continuous pipeline; its answer is what tells the scheduler how to go on ...
_ROUND_S = 2e-3  # ... so rounds are short, but long beside the time that a message takes
_MAX_GROWING = 2  # rounds in flight: the second one runs while the answer to the first travels
_MAX_BRANCHING = 64  # seqs; of more it takes longer to say which branches are worth a row than they save
_CATCH_UP_SHARE = 4  # of the token budget, while others draft


class Drafter:
    """Plans the rounds of the draft engine. Without an engine it plans none, and nobody has drafts."""

    def __init__(self, config: SpeculationConfig, policy: SpeculationPolicy) -> None:
        self._config = config
        self._policy = policy
        self._step_s = _ROUND_S
        self._num_steps = 1  # of a round of the continuous pipeline, at most
        self._drafting: set[Seat] = set()  # serial: their drafts are on the way, and the target waits for them
        self._is_gathering = False  # serial: the round that they are to come from has yet to be sent
        self.seats: DraftSeats | None = None
        self.cache = VerdictCache(config.verdict_cache_rows)
        self._branches = BranchPlanner(self.cache, policy)
        self._calibration = Calibration()
        # What tells where a chain is likely to end: asked for by the choice of branches, and of a chain's length.
        self._asks_confidences = config.pipeline is Pipeline.CONTINUOUS and (
            config.adaptive or config.verdict_cache_rows > 0
        )
        self.num_drafted = 0
        self._num_of_use = 0  # drafts that the target wrote too

    @property
    def engine(self) -> Engine | None:
        return self.seats.engine if self.seats else None

    @property
    def target_waits(self) -> bool:
        """Serial: for drafts, until a round has brought them."""
        return bool(self._drafting) or self._is_gathering

    def attach(self, engine: Engine) -> None:
        self.seats = DraftSeats(engine)

    def detach(self, seqs: Iterable[Seq]) -> None:
        """The engine is gone with all that it held."""
        self.seats = None
        self._drafting.clear()
        self._is_gathering = False
        self.cache.clear()
        for seq in seqs:
            seq.draft = None
            seq.forget_window()

    def release(self, seq: Seq) -> None:
        """The seq drafts no more: finished, preempted or given up."""
        if self.seats is not None:
            if seq.draft is not None:
                self._drafting.discard(seq.draft)
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
                self.seats.release_seat(dropped)
            return
        start = seat.num_agreed
        foreseen = self.cache.resolve(seq, contradicted, start, history[start])
        self._release_branches(seq)
        if foreseen is not None and len(history) == start + 1:
            self.seats.release_seat(seat)
            seq.draft = foreseen
        elif foreseen is not None:
            self.seats.release_seat(foreseen)

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
        if seat is None or seat.is_catching_up or seat.lag(seq.token_ids) > _MAX_LAG:
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
        return seat.lag(seq.token_ids) <= _MAX_LAG and (seq.is_draft_fixed or not self._policy.is_resting)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def plan(self, running: Iterable[Seq], now: float) -> worker_pb2.Round | None:
        """The next round for the draft engine, if it has one to run. `running`: oldest first."""
        self._is_gathering = False
        if self.seats is None:
            return None
        speculating = [seq for seq in running if seq.wants_draft_model and self._may_follow(self.seats, seq)]
        if not speculating:
            return None
        if self._config.pipeline is Pipeline.SERIAL:
            rows = self._plan_serial(self.seats, speculating)
        else:
            rows = self._plan_continuous(self.seats, speculating)
        if not rows:
            return None
        return self.seats.engine.launch(
            rows,
            now,
            num_alternatives=self.cache.num_alternatives if self._config.verdict_cache_rows else 0,
            confidences=self._asks_confidences,
        )

    def on_result(self, result: worker_pb2.RoundResult, now: float, *, target_idle_since: float | None) -> None:
        """Take in a round's drafts. `target_idle_since`: None while it is at work. Raises ProtocolError."""
        assert self.seats is not None, "a result of an engine that is not connected"
        record = self.seats.engine.land(result, now)
        self._drafting.difference_update(row.seat for row in record.rows)
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
            seats.release_seat(self.cache.take(seq, row.seat))
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
            self._step_s += 0.1 * (record.wall_s / result.num_steps - self._step_s)
            self._num_steps = max(1, min(_MAX_STEPS, round(_ROUND_S / self._step_s)))
        self._policy.observe_draft(
            num_seqs=len(computed),
            num_steps=result.num_steps,
            num_chunk_tokens=num_chunk_tokens,
            run_s=record.wall_s,
            beside_target=beside_target,
        )

    # -- serial -------------------------------------------------------------------------------------------------------

    def _plan_serial(self, seats: DraftSeats, speculating: list[Seq]) -> list[PlannedRow]:
        # A drafting round may stand behind one that catches up.
        if self._drafting or len(seats.engine.in_flight) >= 2:
            return []
        seats.seat_newcomers(speculating)
        due = [seq for seq in speculating if self._is_due(seq)]
        ready = [seq for seq in due if seq.draft is not None and not seq.draft.is_catching_up]
        self._ask_policy(ready)
        if len(ready) < len(due) and any(seq.window > seq.num_drafts_ahead for seq in ready):
            # The others catch up with a round that is before any new one: then there are drafts for all from one.
            self._is_gathering = True
            return []
        rows: list[PlannedRow] = []
        budget = seats.engine.info.max_num_batched_tokens
        for seq in ready:
            seq.num_drafted_at = len(seq.token_ids)
            budget -= self._add(seats, rows, seq, seq.window - seq.num_drafts_ahead, budget=budget)
        self._drafting.update(row.seat for row in rows)
        if not rows and not seats.engine.in_flight:
            budget = seats.engine.info.max_num_batched_tokens
            if any(seq.draft is not None and seq.draft.chain for seq in speculating):
                budget //= _CATCH_UP_SHARE  # somebody will want to draft when the target is back
            rows = self._catch_up_rows(seats, speculating, budget)
        return rows

    def _is_due(self, seq: Seq) -> bool:
        """The target has nothing left to do for the seq but to decode, and no drafts were ordered for this position.
        The draft has caught up with it, or will have with a round on its way."""
        return (
            seq.num_rows_in_flight == 0
            and seq.is_decoding
            and not seq.skips_draft
            and seq.num_drafted_at != len(seq.token_ids)
            and seq.draft is not None
            and seq.draft.lag(seq.token_ids) <= _MAX_LAG
        )

    # -- continuous ---------------------------------------------------------------------------------------------------

    def _plan_continuous(self, seats: DraftSeats, speculating: list[Seq]) -> list[PlannedRow]:
        num_in_flight = len(seats.engine.in_flight)
        if num_in_flight > _MAX_GROWING:
            return []
        seats.seat_newcomers(speculating)
        drafting = [seq for seq in speculating if self._may_draft(seq)]
        self._ask_policy(drafting)
        rows: list[PlannedRow] = []
        budget = seats.engine.info.max_num_batched_tokens
        growing = [seq for seq in drafting if self._grows(seq)]
        if num_in_flight == _MAX_GROWING:
            # Nothing is so urgent but to start again: the engine need not compute what that overtakes.
            growing = [seq for seq in growing if seq.draft is not None and seq.draft.is_cut]
        elif self._config.verdict_cache_rows and len(drafting) <= _MAX_BRANCHING:
            # First: a fork takes what the slot holds before the round.
            rows += self._branches.rows(seats, drafting, growing, self._num_steps)
        budget -= sum(row.chunk_len for row in rows)
        for seq in growing:
            budget -= self._add(seats, rows, seq, self._num_missing(seq), budget=budget)
        if num_in_flight < _MAX_GROWING:
            others_draft = rows or num_in_flight
            rows += self._catch_up_rows(seats, speculating, budget // _CATCH_UP_SHARE if others_draft else budget)
        return rows

    def _may_draft(self, seq: Seq) -> bool:
        seat = seq.draft
        return seat is not None and seq.is_decoding and not seat.is_catching_up and seat.lag(seq.token_ids) <= _MAX_LAG

    def _grows(self, seq: Seq) -> bool:
        """The seq's chain deserves another draft."""
        seat = seq.draft
        assert seat is not None, "a seq that may draft has a seat"
        if self._num_missing(seq) == 0:
            return False
        if seat.num_coming and seat.num_agreed < len(seq.token_ids):
            return False  # those on their way tell first whether the chain agrees
        if seq.is_draft_fixed or not self._config.adaptive or not seat.chain:
            return True
        rate = seq.acceptance.rate
        return self._policy.should_extend(seat.survival * rate**seat.num_coming, rate)

    def _odds(self, seq: Seq, confidence: float) -> float:
        """How likely a draft is accepted behind those before it."""
        rate = seq.acceptance.rate
        return self._calibration.rate(confidence, rate, self._policy.prior.rate) if self._asks_confidences else rate

    def _num_missing(self, seq: Seq) -> int:
        """Drafts that the next round is to bring."""
        assert seq.draft is not None, "a seq that may draft has a seat"
        return max(0, min(seq.window - seq.draft.num_ahead, self._num_steps))

    def _ask_policy(self, seqs: Sequence[Seq]) -> None:
        """How far each chain may run from now on; nothing new unless one of the seqs has got on."""
        if all(seq.window_chosen_at == len(seq.token_ids) for seq in seqs):
            return
        windows = self._policy.draft_lengths([self.drafts_of(seq) for seq in seqs])
        for seq, window in zip(seqs, windows, strict=True):
            seq.window = window
            seq.window_chosen_at = len(seq.token_ids)

    # -- both ---------------------------------------------------------------------------------------------------------

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
            if seat.lag(seq.token_ids) <= _MAX_LAG or seq.is_verifying:
                continue
            if not seq.is_draft_fixed and not self._policy.pays_to_catch_up(
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
            self.seats.release_seat(seat)


def _may_be_overtaken(row: PlannedRow) -> bool:
    """A row that brings nothing does not show whether it was computed."""
    return not row.num_draft_tokens and isinstance(row.seat, DraftSeat) and row.seat.is_released
