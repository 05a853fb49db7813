"""What a round will do, worked out and checked before anything is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

from echelon.pb.worker_pb2 import Round, Row, SeqInit
from workers.seq_state import Limits, SeqTable


class ProtocolError(ValueError):
    """A round that no correct scheduler sends. Names round, row and field; no state was touched."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row of a round, resolved against the state that it will find."""

    slot: int
    chunk_len: int  # tokens that go through the model, drafts to be verified not counted
    at_end: bool  # a token is chosen behind the chunk
    num_drafts: int  # target: drafts to be verified; draft: tokens to be drafted


@dataclass(slots=True)
class _View:
    """How long a seq will be when the round reaches its row."""

    length: int
    num_computed: int
    num_blocks: int
    num_prompt: int

    @property
    def num_missing(self) -> int:
        """Tokens without KV."""
        return self.length - self.num_computed


def plan_target(round_: Round, table: SeqTable) -> list[RowPlan]:
    """The rows of a round on a target engine.

    Drafts count only behind the history that they were made for. A seq that has come to max_model_len while the round
    was on its way loses its drafts first; if no token fits any more its decode row does nothing.

    Raises:
        ProtocolError: The round does not fit the state.
    """
    return [_target_row(*entry) for entry in _views(round_, table)]


def plan_draft(round_: Round, table: SeqTable) -> list[RowPlan]:
    """The rows of a round on a draft engine; a chain ends at max_model_len.

    Raises:
        ProtocolError: The round does not fit the state.
    """
    return [_draft_row(*entry) for entry in _views(round_, table)]


def _target_row(row: Row, view: _View, limits: Limits, where: str) -> RowPlan:
    _check_token_ids(row.draft_token_ids, limits, f"{where} draft_token_ids")
    full = view.length == limits.max_model_len
    if full and row.chunk_len == 1 and view.num_missing <= 1:
        return RowPlan(row.slot, 0, False, 0)
    at_end = _check_chunk(row, view, where) and not full
    num_drafts = len(row.draft_token_ids) if at_end and row.draft_base_len == view.length else 0
    num_drafts = max(0, min(num_drafts, limits.max_model_len - view.length - 1))
    _check_blocks(row.chunk_len + num_drafts, view, limits, where)
    return RowPlan(row.slot, row.chunk_len, at_end, num_drafts)


def _draft_row(row: Row, view: _View, limits: Limits, where: str) -> RowPlan:
    full = view.length == limits.max_model_len
    if full and row.chunk_len == 1 and view.num_missing == 0:
        return RowPlan(row.slot, 0, False, 0)
    at_end = _check_chunk(row, view, where)
    num_drafts = min(row.num_draft_tokens, limits.max_model_len - view.length) if at_end else 0
    _check_blocks(row.chunk_len + max(0, num_drafts - 1), view, limits, where)
    return RowPlan(row.slot, row.chunk_len, num_drafts > 0, num_drafts)


def _views(round_: Round, table: SeqTable) -> list[tuple[Row, _View, Limits, str]]:
    """Each row with the state it will find after the round's frees and inits and its own crop, tokens and blocks."""
    limits = table.limits
    where = f"round {round_.round_id}:"
    freed = set(round_.free_slots)
    if len(freed) < len(round_.free_slots):
        raise ProtocolError(f"{where} free_slots: a slot is named twice")
    for slot in freed:
        if not table.holds(slot):
            raise ProtocolError(f"{where} free_slots: slot {slot} holds no seq")
    started: dict[int, _View] = {}
    for index, seq in enumerate(round_.init_seqs):
        place = f"{where} init_seqs[{index}] (slot {seq.slot}):"
        if seq.slot in started or (table.holds(seq.slot) and seq.slot not in freed):
            raise ProtocolError(f"{place} slot: is taken")
        started[seq.slot] = _check_init(seq, limits, place)
    seen: set[int] = set()
    entries = []
    for index, row in enumerate(round_.rows):
        slot, place = row.slot, f"{where} rows[{index}] (slot {row.slot}):"
        view = started.get(slot)
        if view is None:
            if slot in freed or not table.holds(slot):
                raise ProtocolError(f"{place} slot: holds no seq")
            view = _View(*table.sizes(slot))
        if slot in seen:
            raise ProtocolError(f"{place} slot: has a row already")
        seen.add(slot)
        _change(row, view, limits, place)
        entries.append((row, view, limits, place))
    return entries


def _check_init(seq: SeqInit, limits: Limits, where: str) -> _View:
    num_tokens, num_blocks = len(seq.token_ids), len(seq.block_table)
    if seq.slot >= limits.num_slots:
        raise ProtocolError(f"{where} slot: must be below {limits.num_slots}")
    if not 1 <= num_tokens <= limits.max_model_len:
        raise ProtocolError(f"{where} token_ids: {num_tokens} tokens, must be 1 to {limits.max_model_len}")
    if not 1 <= seq.num_prompt_tokens <= num_tokens:
        raise ProtocolError(f"{where} num_prompt_tokens: {seq.num_prompt_tokens}, must be 1 to {num_tokens}")
    _check_token_ids(seq.token_ids, limits, f"{where} token_ids")
    view = _View(num_tokens, seq.num_computed_tokens, 0, seq.num_prompt_tokens)
    _check_new_blocks(seq.block_table, view, limits, f"{where} block_table")
    if seq.num_computed_tokens > min(num_tokens, num_blocks * limits.block_size):
        raise ProtocolError(
            f"{where} num_computed_tokens: {seq.num_computed_tokens}, but there are {num_tokens} tokens "
            f"and {num_blocks} blocks of {limits.block_size}"
        )
    view.num_blocks = num_blocks
    return view


def _change(row: Row, view: _View, limits: Limits, where: str) -> None:
    """Steps 1 to 3 of a row, on the view only."""
    if row.HasField("crop_len"):
        if not view.num_prompt <= row.crop_len <= view.length:
            raise ProtocolError(
                f"{where} crop_len: {row.crop_len}, must be {view.num_prompt} (prompt) to {view.length} (history)"
            )
        view.length = row.crop_len
        view.num_computed = min(view.num_computed, view.length)
    if row.append_token_ids:
        _check_token_ids(row.append_token_ids, limits, f"{where} append_token_ids")
        view.length += len(row.append_token_ids)
        if view.length > limits.max_model_len:
            raise ProtocolError(
                f"{where} append_token_ids: make {view.length} tokens, more than max_model_len {limits.max_model_len}"
            )
    if row.new_block_ids:
        _check_new_blocks(row.new_block_ids, view, limits, f"{where} new_block_ids")
        view.num_blocks += len(row.new_block_ids)


def _check_chunk(row: Row, view: _View, where: str) -> bool:
    """Whether the chunk reaches the end of the history."""
    if row.chunk_len > view.num_missing:
        raise ProtocolError(
            f"{where} chunk_len: {row.chunk_len}, but only {view.num_missing} of {view.length} tokens have no KV yet"
        )
    return row.chunk_len > 0 and row.chunk_len == view.num_missing


def _check_blocks(num_tokens: int, view: _View, limits: Limits, where: str) -> None:
    end = view.num_computed + num_tokens
    if num_tokens and end > view.num_blocks * limits.block_size:
        raise ProtocolError(
            f"{where} new_block_ids: position {end - 1} will be written, "
            f"but the block table has {view.num_blocks} blocks of {limits.block_size}"
        )


def _check_new_blocks(block_ids: Sequence[int], view: _View, limits: Limits, where: str) -> None:
    if view.num_blocks + len(block_ids) > limits.max_blocks:
        raise ProtocolError(
            f"{where}: make {view.num_blocks + len(block_ids)} blocks, a seq has {limits.max_blocks} at most"
        )
    if block_ids and max(block_ids) >= limits.num_blocks:
        raise ProtocolError(f"{where}: block {max(block_ids)}, must be below {limits.num_blocks}")


def _check_token_ids(token_ids: Sequence[int], limits: Limits, where: str) -> None:
    if token_ids and max(token_ids) >= limits.vocab_size:
        raise ProtocolError(f"{where}: token id {max(token_ids)}, must be below {limits.vocab_size}")
