"""Removes rows of a draft engine that a later round has made useless.

A scheduler keeps a second round queued, so that the engine is not idle while an answer travels. Suppose that a verdict
ends a chain meanwhile. Then the round that restarts the chain, or frees its slot, may arrive before the queued round
runs. Results that the scheduler would drop are then not computed.
"""

from collections.abc import Sequence

from echelon.pb.worker_pb2 import Round
from workers.engine.seq_state import SeqTable


def drop_overtaken(round_: Round, queued: Sequence[Round], table: SeqTable) -> None:
    """Remove the work of rows that the rounds `queued` after it overtake: they free the row's slot, or crop it to
    tokens that have KV before the row. The other changes of the round stay."""
    if not queued:
        return
    freed = {slot for later in queued for slot in later.free_slots}
    crops: dict[int, int] = {}  # the shortest of each slot
    for later in queued:
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
    """This round has not given the slot to another seq."""
    return table.holds(slot) and slot not in round_.free_slots
