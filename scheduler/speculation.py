"""Serial speculation: the draft engine drafts, then the target verifies.

The draft engine holds each seq's history and, behind it, the chain of its own drafts. Before it drafts again the chain
is cut where the verdict left it and the committed tokens are appended (`_Resync`). A seq whose draft KV lags far
behind is caught up in rounds of their own, beside the target's, and decodes without drafts until then. Everything on
the draft engine is best effort: no seq waits for its slots or blocks.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from echelon.pb import worker_pb2
from scheduler.engine import Engine, PlannedRow
from scheduler.seq import DraftSeat, Seq

__all__ = ["Drafter"]

logger = logging.getLogger(__name__)

_MAX_LAG = 32  # tokens that a drafting round may catch up on the way: the target waits for it
_MAX_ROUNDS = 2  # a drafting round may stand behind one that catches up


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resync:
    """How the draft engine's tokens become the history again."""

    crop_len: int | None
    append_token_ids: list[int]
    num_computed: int


def _resync(seq: Seq, seat: DraftSeat) -> _Resync:
    history = seq.token_ids
    held_len = seat.num_known + len(seat.chain)
    keep = seat.num_known
    for token_id in seat.chain:
        if keep >= len(history) or history[keep] != token_id:
            break
        keep += 1
    if min(seat.num_computed, keep) >= len(history):
        keep = len(history) - 1  # a token is chosen behind a computed one: compute the last once more
    return _Resync(
        crop_len=keep if keep < held_len else None,
        append_token_ids=history[keep:],
        num_computed=min(seat.num_computed, keep),
    )


def _is_ready(seq: Seq) -> bool:
    """The target has nothing left to do for the seq but to decode, and no drafts were ordered for this position."""
    return (
        seq.num_rows_in_flight == 0
        and seq.num_outputs > 0
        and seq.num_uncomputed == 1
        and seq.num_drafted_at != len(seq.token_ids)
    )


class Drafter:
    """Plans the rounds of the draft engine. Without an engine it plans none, and seqs decode without drafts."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.num_seated = 0
        self._drafting: set[Seq] = set()  # their drafts are on the way: the target waits for them

    @property
    def is_drafting(self) -> bool:
        return bool(self._drafting)

    def attach(self, engine: Engine) -> None:
        self.engine = engine

    def detach(self, seqs: Iterable[Seq]) -> None:
        """The engine is gone with all that it held."""
        self.engine = None
        self._drafting.clear()
        self.num_seated = 0
        for seq in seqs:
            seq.draft = None

    def release(self, seq: Seq) -> None:
        """The seq drafts no more: finished, preempted or given up."""
        self._drafting.discard(seq)
        seq.drafts = []
        if seq.draft is None or self.engine is None:
            return
        self.engine.release(seq.draft)
        seq.draft = None
        self.num_seated -= 1

    def plan(self, running: Iterable[Seq]) -> worker_pb2.Round | None:
        """The next round for the draft engine, if it has one to run. `running`: oldest first."""
        engine = self.engine
        if engine is None or self._drafting or len(engine.in_flight) >= _MAX_ROUNDS:
            return None
        speculating = [seq for seq in running if seq.max_drafts and self._may_follow(engine, seq)]
        self._seat_newcomers(engine, speculating)
        rows = self._drafting_rows(engine, speculating)
        if rows:
            self._drafting.update(row.seq for row in rows)
        elif not engine.in_flight:
            rows = self._catch_up_rows(engine, speculating)
        return engine.launch(rows) if rows else None

    def on_result(self, result: worker_pb2.RoundResult) -> int:
        """Take in a round's drafts -> how many tokens were drafted."""
        assert self.engine is not None, "a result of an engine that is not connected"
        record = self.engine.land(result)
        num_drafted = 0
        for row, answer in zip(record.rows, result.rows, strict=True):
            if row.seq.draft is not row.seat:
                continue
            num_drafted += self._take_drafts(row, answer)
        return num_drafted

    def _take_drafts(self, row: PlannedRow, answer: worker_pb2.RowResult) -> int:
        seq, seat = row.seq, row.seat
        assert isinstance(seat, DraftSeat), "the draft engine seats draft seats"
        assert self.engine is not None, "a result of an engine that is not connected"
        self._drafting.discard(seq)
        seat.is_catching_up = False
        if answer.non_finite:
            logger.warning("request %s: non-finite draft logits, going on without drafts", seq.request.request_id)
            self.engine.blocks.forget(seat.block_ids[: seat.num_published])
            self._give_up(seq)
            return 0
        self.engine.publish(seq, seat, row.start + row.chunk_len)
        if row.num_draft_tokens == 0:
            return 0
        seat.chain = list(answer.token_ids)
        seat.num_computed += max(0, len(seat.chain) - 1)  # the last draft has not been computed
        seq.drafts = seat.chain.copy()
        return len(seat.chain)

    def _may_follow(self, engine: Engine, seq: Seq) -> bool:
        """Whether there is room for the seq and a draft in the draft's context, which may be the shorter one."""
        if len(seq.token_ids) < engine.info.max_model_len:
            return True
        self._give_up(seq)
        return False

    def _give_up(self, seq: Seq) -> None:
        """The seq goes on without drafts."""
        self.release(seq)
        seq.max_drafts = 0

    def _seat_newcomers(self, engine: Engine, speculating: list[Seq]) -> None:
        for seq in speculating:
            if seq.draft is not None:
                continue
            if engine.num_free_slots == 0:
                return
            if seq.num_free_at_refusal != engine.blocks.num_free and not self._seat(engine, seq):
                seq.num_free_at_refusal = engine.blocks.num_free

    def _seat(self, engine: Engine, seq: Seq) -> bool:
        """Blocks for the whole history at once: catching up never gets stuck half way."""
        blocks = engine.blocks
        found = engine.find_prefix(seq)
        most = min(seq.max_len, engine.info.max_model_len)
        num_new = blocks.num_blocks_for(min(len(seq.token_ids) + seq.max_drafts, most)) - len(found)
        if num_new + blocks.num_idle_among(found) > blocks.num_free:
            return False
        if max(seq.token_ids) >= engine.info.vocab_size:  # padding of the target's vocabulary that the draft lacks
            self._give_up(seq)
            return False
        blocks.hold(found)
        seat = DraftSeat(
            slot=engine.take_slot(),
            block_ids=found + blocks.allocate(num_new, found[-1] if found else None),
            num_computed=len(found) * blocks.block_size,
            num_published=len(found),
            num_known=0,
        )
        seq.draft = seat
        self.num_seated += 1
        return True

    def _drafting_rows(self, engine: Engine, speculating: list[Seq]) -> list[PlannedRow]:
        rows: list[PlannedRow] = []
        budget = engine.info.max_num_batched_tokens
        for seq in speculating:
            seat = seq.draft
            if seat is None or seat.is_catching_up or not _is_ready(seq):
                continue
            row = self._drafting_row(engine, seq, seat)
            if row is None or row.chunk_len > budget:
                continue
            budget -= row.chunk_len
            self._apply(row, seat)
            seq.num_drafted_at = len(seq.token_ids)
            rows.append(row)
        return rows

    def _drafting_row(self, engine: Engine, seq: Seq, seat: DraftSeat) -> PlannedRow | None:
        length = len(seq.token_ids)
        resync = _resync(seq, seat) if seat.introduced else None
        start = seat.num_computed if resync is None else resync.num_computed
        if length - start > _MAX_LAG:
            return None
        # The last draft is not computed, so k drafts need k - 1 positions behind the history.
        most = min(seq.max_len - 1, engine.info.max_model_len)
        k = min(seq.max_drafts, most - length, engine.room_for(seat) - length + 1)
        if k < 1 or not engine.grow(seat, length + k - 1):
            return None
        return PlannedRow(
            seq=seq,
            seat=seat,
            start=start,
            chunk_len=length - start,
            crop_len=resync.crop_len if resync else None,
            append_token_ids=resync.append_token_ids if resync else (),
            num_draft_tokens=k,
        )

    def _catch_up_rows(self, engine: Engine, speculating: list[Seq]) -> list[PlannedRow]:
        rows: list[PlannedRow] = []
        budget = engine.info.max_num_batched_tokens
        if any(seq.draft is not None and seq.drafts for seq in speculating):
            budget //= 4  # somebody will want to draft when the target is back
        for seq in speculating:
            seat = seq.draft
            if seat is None or seq.drafts or seq.is_verifying:
                continue
            resync = _resync(seq, seat) if seat.introduced else None
            start = seat.num_computed if resync is None else resync.num_computed
            # The last token is left for the drafting round, which chooses behind it.
            lag = len(seq.token_ids) - 1 - start
            if lag < _MAX_LAG or budget < 1 or not engine.grow(seat, start + min(lag, budget)):
                continue
            row = PlannedRow(
                seq=seq,
                seat=seat,
                start=start,
                chunk_len=min(lag, budget),
                crop_len=resync.crop_len if resync else None,
                append_token_ids=resync.append_token_ids if resync else (),
            )
            budget -= row.chunk_len
            self._apply(row, seat)
            seat.is_catching_up = True
            rows.append(row)
        return rows

    def _apply(self, row: PlannedRow, seat: DraftSeat) -> None:
        seat.num_known = len(row.seq.token_ids)
        seat.chain = []
