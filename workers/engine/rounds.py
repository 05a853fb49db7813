"""What a round will do, worked out and checked before anything is touched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from echelon.pb.worker_pb2 import Fork, Round, Row, SeqInit
from workers.engine.seq_state import Limits, SeqTable


class ProtocolError(ValueError):
    """A round that no correct scheduler sends. Names round, row and field; no state was touched."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row of a round, resolved against the state that it will find."""

    slot: int
    chunk_len: int  # tokens that go through the model, drafts to be verified not counted
    at_end: bool  # a token is chosen behind the chunk
    num_drafts: int  # target: drafts to be verified; draft: tokens to be drafted
    num_ordered: int = 0  # draft: the same, had the chain no end
    calibrate_len: int = 0  # draft: tokens with approximate KV that are computed again first
    goes_on: bool = False  # draft: a chain of earlier rounds grows; the chunk is its last token, approximate KV will do

    @property
    def is_idle(self) -> bool:
        return self.chunk_len == 0 and self.calibrate_len == 0


@dataclass(slots=True, kw_only=True)
class _View:
    """What a seq will be when the round reaches its row. The fields are those of SeqTable."""

    length: int
    num_computed: int
    num_exact: int
    num_given: int
    num_blocks: int
    num_prompt: int
    fell_short: bool = False
    is_void: bool = False

    @classmethod
    def of(cls, table: SeqTable, slot: int) -> "_View":
        return cls(
            length=int(table.lengths[slot]),
            num_computed=int(table.num_computed[slot]),
            num_exact=int(table.num_exact[slot]),
            num_given=int(table.num_given[slot]),
            num_blocks=int(table.num_blocks[slot]),
            num_prompt=int(table.num_prompt[slot]),
            fell_short=bool(table.fell_short[slot]),
            is_void=bool(table.is_void[slot]),
        )

    def crop(self, length: int) -> None:
        self.length = length
        self.num_computed = min(self.num_computed, length)
        self.num_exact = min(self.num_exact, length)
        self.num_given = min(self.num_given, length)
        self.fell_short = False

    def fork(self, length: int) -> "_View":
        branch = replace(self)
        branch.crop(length)
        return branch

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
    if round_.forks:
        raise ProtocolError(f"round {round_.round_id}: forks: only a draft engine has branches")
    return [_target_row(*entry) for entry in _views(round_, table)]


def plan_draft(round_: Round, table: SeqTable) -> list[RowPlan]:
    """The rows of a round on a draft engine.

    A chain ends at max_model_len, or where the logits are not finite. Rounds that were on their way by then ask for
    more of it: their rows find nothing to do, and so do those of a branch that was to leave it behind its end.

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
    if view.is_void:
        return RowPlan(row.slot, 0, False, 0)
    calibrate_len = min(row.calibrate_len, view.num_computed - view.num_exact)
    if row.chunk_len == 1 and view.num_missing == 0 and view.fell_short:
        return RowPlan(row.slot, 0, False, 0, calibrate_len=calibrate_len)
    num_ordered = row.num_draft_tokens if _check_chunk(row, view, where) else 0
    num_drafts = min(num_ordered, limits.max_model_len - view.length)
    _check_blocks(row.chunk_len + max(0, num_drafts - 1), view, limits, where)
    return RowPlan(
        row.slot,
        row.chunk_len,
        num_drafts > 0,
        num_drafts,
        num_ordered=num_ordered,
        calibrate_len=calibrate_len,
        goes_on=row.chunk_len == 1 and num_drafts > 0 and view.num_given < view.length,
    )


def _views(round_: Round, table: SeqTable) -> list[tuple[Row, _View, Limits, str]]:
    """Each row with the state it will find: after the round's frees, inits and forks and its own crop, tokens and
    blocks."""
    where = f"round {round_.round_id}:"
    started = _started(round_, table, where)
    seen: set[int] = set()
    entries = []
    for index, row in enumerate(round_.rows):
        slot, place = row.slot, f"{where} rows[{index}] (slot {row.slot}):"
        view = started.get(slot) or (_View.of(table, slot) if table.holds(slot) else None)
        if view is None or (slot not in started and slot in round_.free_slots):
            raise ProtocolError(f"{place} slot: holds no seq")
        if slot in seen:
            raise ProtocolError(f"{place} slot: has a row already")
        seen.add(slot)
        if not view.is_void:
            _change(row, view, table.limits, place)
        entries.append((row, view, table.limits, place))
    return entries


def _started(round_: Round, table: SeqTable, where: str) -> dict[int, _View]:
    """The slots that are taken in this round, by seqs and by branches."""
    freed = set(round_.free_slots)
    if len(freed) < len(round_.free_slots):
        raise ProtocolError(f"{where} free_slots: a slot is named twice")
    for slot in freed:
        if not table.holds(slot):
            raise ProtocolError(f"{where} free_slots: slot {slot} holds no seq")
    started: dict[int, _View] = {}

    def check_free(slot: int, place: str) -> None:
        if slot >= table.limits.num_slots:
            raise ProtocolError(f"{place} slot: must be below {table.limits.num_slots}")
        if slot in started or (table.holds(slot) and slot not in freed):
            raise ProtocolError(f"{place} slot: is taken")

    for index, seq in enumerate(round_.init_seqs):
        place = f"{where} init_seqs[{index}] (slot {seq.slot}):"
        check_free(seq.slot, place)
        started[seq.slot] = _check_init(seq, table.limits, place)
    for index, fork in enumerate(round_.forks):
        place = f"{where} forks[{index}] (slot {fork.slot}):"
        check_free(fork.slot, place)
        parent = started.get(fork.parent_slot)
        if parent is None and table.holds(fork.parent_slot) and fork.parent_slot not in freed:
            parent = _View.of(table, fork.parent_slot)
        if parent is None:
            raise ProtocolError(f"{place} parent_slot: slot {fork.parent_slot} holds no seq")
        started[fork.slot] = _check_fork(fork, parent, table.limits, place)
    return started


def _check_init(seq: SeqInit, limits: Limits, where: str) -> _View:
    num_tokens, num_blocks = len(seq.token_ids), len(seq.block_table)
    if not 1 <= num_tokens <= limits.max_model_len:
        raise ProtocolError(f"{where} token_ids: {num_tokens} tokens, must be 1 to {limits.max_model_len}")
    if not 1 <= seq.num_prompt_tokens <= num_tokens:
        raise ProtocolError(f"{where} num_prompt_tokens: {seq.num_prompt_tokens}, must be 1 to {num_tokens}")
    _check_token_ids(seq.token_ids, limits, f"{where} token_ids")
    view = _View(
        length=num_tokens,
        num_computed=seq.num_computed_tokens,
        num_exact=seq.num_computed_tokens,
        num_given=num_tokens,
        num_blocks=0,
        num_prompt=seq.num_prompt_tokens,
    )
    _check_new_blocks(seq.block_table, view, limits, f"{where} block_table")
    if seq.num_computed_tokens > min(num_tokens, num_blocks * limits.block_size):
        raise ProtocolError(
            f"{where} num_computed_tokens: {seq.num_computed_tokens}, but there are {num_tokens} tokens "
            f"and {num_blocks} blocks of {limits.block_size}"
        )
    view.num_blocks = num_blocks
    return view


def _check_fork(fork: Fork, parent: _View, limits: Limits, where: str) -> _View:
    length, block_size = fork.length, limits.block_size
    if parent.is_void or (parent.fell_short and length > parent.length):
        return replace(parent, is_void=True)
    if not parent.num_prompt <= length <= parent.length:
        raise ProtocolError(
            f"{where} length: {length}, must be {parent.num_prompt} (prompt) to {parent.length} (the parent's tokens)"
        )
    if length // block_size > parent.num_blocks:
        raise ProtocolError(
            f"{where} length: {length} fills {length // block_size} blocks of {block_size}, "
            f"but the parent has {parent.num_blocks}"
        )
    branch = parent.fork(length)
    branch.num_blocks = length // block_size
    _check_new_blocks(fork.new_block_ids, branch, limits, f"{where} new_block_ids")
    branch.num_blocks += len(fork.new_block_ids)
    if branch.num_computed > branch.num_blocks * block_size:
        raise ProtocolError(
            f"{where} new_block_ids: {branch.num_computed} tokens have KV, "
            f"but the block table has {branch.num_blocks} blocks of {block_size}"
        )
    return branch


def _change(row: Row, view: _View, limits: Limits, where: str) -> None:
    """Steps 1 to 3 of a row, on the view only."""
    if row.HasField("crop_len"):
        if not view.num_prompt <= row.crop_len <= view.length:
            raise ProtocolError(
                f"{where} crop_len: {row.crop_len}, must be {view.num_prompt} (prompt) to {view.length} (history)"
            )
        view.crop(row.crop_len)
    if row.append_token_ids:
        _check_token_ids(row.append_token_ids, limits, f"{where} append_token_ids")
        view.length += len(row.append_token_ids)
        view.num_given, view.fell_short = view.length, False
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
