"""Drafts in the rows of a target round."""

from collections.abc import Mapping, Sequence
from itertools import takewhile

from scheduler.engines.engine import EngineView
from scheduler.target.row import TargetRow
from scheduler.target.state import TargetState


def add_drafts(
    engine: EngineView[TargetRow],
    rows: dict[TargetState, TargetRow],
    chosen: Mapping[TargetState, Sequence[int]],
    *,
    budget: int,
) -> None:
    """Add the chosen drafts to decode rows, as far as free blocks and `budget` tokens of the round allow; they preempt
    no seq."""
    budget -= sum(row.chunk_len for row in rows.values())
    for state, row in rows.items():
        wanted = chosen.get(state)
        if not wanted:
            continue
        room = engine.room_for(row.slot) - row.start - 1
        # Padding of the draft's vocabulary may reach beyond the target's.
        known = list(takewhile(lambda token_id: token_id < engine.info.vocab_size, wanted))
        drafts = known[: max(0, min(budget, room))]
        if drafts and engine.grow(row.slot, row.start + 1 + len(drafts)):
            row.drafts = drafts
            budget -= len(drafts)
