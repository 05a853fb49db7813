"""The serial pipeline: the draft engine drafts for every seq that is about to be verified, and the target waits."""

from collections.abc import Collection, Iterable

from echelon.pb import worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.drafter import Drafter
from scheduler.drafting.seats import DraftSeats
from scheduler.engines.engine import InFlight, PlannedRow
from scheduler.engines.seat import Seat
from scheduler.policy.serial import SerialPolicy
from scheduler.requests.request import Seq


class Serial(Drafter):
    def __init__(self, config: SpeculationConfig) -> None:
        super().__init__(config, SerialPolicy(max_drafts=config.num_speculative_tokens, adaptive=config.adaptive))
        self._drafting: set[Seat] = set()  # their drafts are on the way
        self._is_gathering = False  # the round that they are to come from has yet to be sent

    @property
    def target_waits(self) -> bool:
        return bool(self._drafting) or self._is_gathering

    def detach(self, seqs: Iterable[Seq]) -> None:
        self._drafting.clear()
        self._is_gathering = False
        super().detach(seqs)

    def release(self, seq: Seq) -> None:
        if seq.draft is not None:
            self._drafting.discard(seq.draft)
        super().release(seq)

    def plan(self, running: Iterable[Seq], now: float, *, served: Collection[Seq] = ()) -> worker_pb2.Round | None:
        self._is_gathering = False
        return super().plan(running, now, served=served)

    def _on_landed(self, record: InFlight) -> None:
        self._drafting.difference_update(row.seat for row in record.rows)

    def _observe_step(self, step_s: float) -> None:
        """A round has as many steps as drafts were ordered."""

    def _plan_rows(self, seats: DraftSeats, speculating: list[Seq]) -> list[PlannedRow]:
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
                budget //= self._tuning.catch_up_share  # somebody will want to draft when the target is back
            rows = self._catch_up_rows(seats, speculating, budget)
        return rows

    def _is_due(self, seq: Seq) -> bool:
        """The target has nothing left to do for the seq but to decode, and no drafts were ordered for this position.
        The draft has caught up with it, or will have with a round on its way."""
        return (
            seq.num_rows_in_flight == 0
            and seq.is_decoding
            and seq not in self._served
            and seq.num_drafted_at != len(seq.token_ids)
            and seq.draft is not None
            and seq.draft.lag(seq.token_ids) <= self._tuning.max_lag
        )
