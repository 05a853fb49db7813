"""Rows of a draft engine that a round behind them has made useless.

A scheduler keeps a second round queued, so that the engine does not stand idle while an answer travels. Where a verdict
has ended a chain meanwhile, the round that starts it again, or frees its slot, may have arrived before the queued one
runs. What nobody will look at is then not computed.
"""

from collections.abc import Sequence

from echelon.pb.worker_pb2 import Round, Row
from workers.seq_state import SeqTable


def drop_overtaken(round_: Round, behind: Sequence[Round], table: SeqTable) -> None:
    """Takes the work out of those rows of the round that rounds `behind` it overtake: the row of a slot that they free,
    or crop to tokens that have KV before the row. What else the round changes stays."""
    for row in round_.rows:
        # Calibration counts as done once it is sent.
        if row.calibrate_len == 0 and any(_overtakes(later, row, table) for later in behind):
            row.chunk_len = row.num_draft_tokens = 0


def _overtakes(later: Round, row: Row, table: SeqTable) -> bool:
    if row.slot in later.free_slots:
        return True
    if not table.holds(row.slot):
        return False  # the round itself takes the slot
    num_computed = int(table.num_computed[row.slot])
    if row.HasField("crop_len"):
        num_computed = min(num_computed, row.crop_len)
    return any(
        other.slot == row.slot and other.HasField("crop_len") and other.crop_len <= num_computed for other in later.rows
    )
