"""Rows of a draft engine that a round behind them has made useless.

A scheduler keeps a second round queued, so that the engine does not stand idle while an answer travels. Where a verdict
has ended a chain meanwhile, the round that starts it again, or frees its slot, may have arrived before the queued one
runs. What nobody will look at is then not computed.
"""

from collections.abc import Sequence

from echelon.pb.worker_pb2 import Round
from workers.engine.seq_state import SeqTable


def drop_overtaken(round_: Round, behind: Sequence[Round], table: SeqTable) -> None:
    """Takes the work out of those rows of the round that rounds `behind` it overtake: the row of a slot that they free,
    or crop to tokens that have KV before the row. What else the round changes stays."""
    if not behind:
        return
    freed = {slot for later in behind for slot in later.free_slots}
    crops: dict[int, int] = {}  # the shortest of each slot
    for later in behind:
        for row in later.rows:
            if row.HasField("crop_len"):
                crops[row.slot] = min(row.crop_len, crops.get(row.slot, row.crop_len))
    for row in round_.rows:
        if row.calibrate_len:
            continue  # counts as done once it is sent
        num_computed = int(table.num_computed[row.slot]) if _holds_already(row.slot, round_, table) else 0
        if row.HasField("crop_len"):
            num_computed = min(num_computed, row.crop_len)
        if row.slot in freed or crops.get(row.slot, num_computed + 1) <= num_computed:
            row.chunk_len = row.num_draft_tokens = 0


def _holds_already(slot: int, round_: Round, table: SeqTable) -> bool:
    """The slot has not been given to another seq by this round."""
    return table.holds(slot) and slot not in round_.free_slots
