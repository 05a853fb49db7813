"""Blocks that were brought to the device for seqs that do not run yet."""

from collections.abc import Iterable

from scheduler.engines.engine import EngineView
from scheduler.target.row import TargetRow
from scheduler.target.state import TargetState


def leave_fetch(engine: EngineView[TargetRow] | None, state: TargetState) -> None:
    """Nothing is kept or brought for the seq any more."""
    if state.fetch is not None and engine is not None and engine.tiers is not None:
        engine.tiers.fetching.leave(state.fetch)
    state.fetch = None


def let_go(engine: EngineView[TargetRow] | None, states: Iterable[TargetState]) -> bool:
    """Blocks that were fetched for these seqs may be evicted, since another finds too few. Returns whether there are
    any."""
    holding = [state for state in states if state.fetch is not None]
    for state in holding:
        leave_fetch(engine, state)
        state.has_fetched = False
    return bool(holding)
