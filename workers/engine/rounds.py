"""Plans a round and checks it, before any state changes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.sampling_ranges import MAX_LOGPROBS
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import Fork, Round, Row, SeqInit
from workers.engine.seq_state import Limits, SeqTable
from workers.engine.slot_state import SlotState

_MAX_ALTERNATIVES = 64  # per draft; a scheduler asks for a few


class ProtocolError(ValueError):
    """A round that no correct scheduler sends. Names round, row and field; no state has changed."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What one row of a round does, given the state at its start."""

    slot: int
    chunk_len: int  # tokens that go through the model, excluding drafts to verify
    at_end: bool  # a token is chosen after the chunk
    num_drafts: int  # target: drafts to verify; draft: tokens to draft
    num_ordered: int = 0  # draft: tokens that the row asks for, ignoring max_model_len
    calibrate_len: int = 0  # draft: tokens whose approximate KV is first computed exactly
    goes_on: bool = False  # draft: extends an earlier round's chain; its chunk is one token, approximate KV is enough

    @property
    def is_idle(self) -> bool:
        return self.chunk_len == 0 and self.calibrate_len == 0


def plan_target(round_: Round, table: SeqTable) -> list[RowPlan]:
    """Plan the rows of a round on a target engine.

    Drafts count only if they continue the history for which they were made. A seq that reached max_model_len while the
    round was in flight loses its drafts first. If no token fits, its decode row does nothing.

    Raises:
        ProtocolError: The round does not fit the state.
    """
    if round_.forks:
        raise ProtocolError(f"round {round_.round_id}: forks: only a draft engine has branches")
    plans = [_target_row(*entry) for entry in _views(round_, table)]
    num_tokens = sum(plan.chunk_len + plan.num_drafts for plan in plans)
    if num_tokens > table.limits.max_num_batched_tokens:
        raise ProtocolError(
            f"round {round_.round_id}: rows: {num_tokens} tokens go through the model, must be at most "
            f"{table.limits.max_num_batched_tokens}"
        )
    return plans


def plan_draft(round_: Round, table: SeqTable) -> list[RowPlan]:
    """Plan the rows of a round on a draft engine.

    A chain ends at max_model_len, or where the logits are not finite. Rounds in flight may ask for more of it. Their
    rows then find nothing to do. The same holds for rows of a branch that should fork after its end.

    Raises:
        ProtocolError: The round does not fit the state.
    """
    if round_.num_alternatives > _MAX_ALTERNATIVES:
        raise ProtocolError(
            f"round {round_.round_id}: num_alternatives: {round_.num_alternatives}, must be at most {_MAX_ALTERNATIVES}"
        )
    return [_draft_row(*entry) for entry in _views(round_, table)]


def _target_row(row: Row, state: SlotState, limits: Limits, where: str) -> RowPlan:
    _check_token_ids(row.draft_token_ids, limits, f"{where} draft_token_ids")
    full = state.length == limits.max_model_len
    if full and row.chunk_len == 1 and state.num_missing <= 1:
        return RowPlan(row.slot, 0, False, 0)
    at_end = _check_chunk(row, state, where) and not full
    num_drafts = len(row.draft_token_ids) if at_end and row.draft_base_len == state.length else 0
    num_drafts = max(0, min(num_drafts, limits.max_model_len - state.length - 1))
    _check_blocks(row.chunk_len + num_drafts, state, limits, where)
    return RowPlan(row.slot, row.chunk_len, at_end, num_drafts)


def _draft_row(row: Row, state: SlotState, limits: Limits, where: str) -> RowPlan:
    if state.is_void:
        return RowPlan(row.slot, 0, False, 0)
    calibrate_len = min(row.calibrate_len, state.num_computed - state.num_exact)
    if row.chunk_len == 1 and state.num_missing == 0 and state.fell_short:
        return RowPlan(row.slot, 0, False, 0, calibrate_len=calibrate_len)
    num_ordered = row.num_draft_tokens if _check_chunk(row, state, where) else 0
    num_drafts = min(num_ordered, limits.max_model_len - state.length)
    _check_blocks(row.chunk_len + max(0, num_drafts - 1), state, limits, where)
    return RowPlan(
        row.slot,
        row.chunk_len,
        num_drafts > 0,
        num_drafts,
        num_ordered=num_ordered,
        calibrate_len=calibrate_len,
        goes_on=row.chunk_len == 1 and num_drafts > 0 and state.num_given < state.length,
    )


def _views(round_: Round, table: SeqTable) -> list[tuple[Row, SlotState, Limits, str]]:
    """Each row with its state after the round's frees, inits and forks and the row's own changes."""
    where = f"round {round_.round_id}:"
    started = _started(round_, table, where)
    seen: set[int] = set()
    entries = []
    for index, row in enumerate(round_.rows):
        slot, place = row.slot, f"{where} rows[{index}] (slot {row.slot}):"
        state = started.get(slot) or (table.state(slot) if table.holds(slot) else None)
        if state is None or (slot not in started and slot in round_.free_slots):
            raise ProtocolError(f"{place} slot: holds no seq")
        if slot in seen:
            raise ProtocolError(f"{place} slot: has a row already")
        seen.add(slot)
        if not state.is_void:
            _change(row, state, table.limits, place)
        entries.append((row, state, table.limits, place))
    return entries


def _started(round_: Round, table: SeqTable, where: str) -> dict[int, SlotState]:
    """The slots that seqs and branches take in this round."""
    freed = set(round_.free_slots)
    if len(freed) < len(round_.free_slots):
        raise ProtocolError(f"{where} free_slots: a slot is named twice")
    for slot in freed:
        if not table.holds(slot):
            raise ProtocolError(f"{where} free_slots: slot {slot} holds no seq")
    started: dict[int, SlotState] = {}

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
            parent = table.state(fork.parent_slot)
        if parent is None:
            raise ProtocolError(f"{place} parent_slot: slot {fork.parent_slot} holds no seq")
        started[fork.slot] = _check_fork(fork, parent, table.limits, place)
    return started


def _check_init(seq: SeqInit, limits: Limits, where: str) -> SlotState:
    num_tokens, num_blocks = len(seq.token_ids), len(seq.block_table)
    if not 1 <= num_tokens <= limits.max_model_len:
        raise ProtocolError(f"{where} token_ids: {num_tokens} tokens, must be 1 to {limits.max_model_len}")
    if not 1 <= seq.num_prompt_tokens <= num_tokens:
        raise ProtocolError(f"{where} num_prompt_tokens: {seq.num_prompt_tokens}, must be 1 to {num_tokens}")
    _check_token_ids(seq.token_ids, limits, f"{where} token_ids")
    _check_host_slots(seq.block_table[: seq.num_in_host], limits, f"{where} block_table")
    _check_new_blocks(seq.num_in_host, seq.block_table[seq.num_in_host :], limits, f"{where} block_table")
    if seq.num_computed_tokens > min(num_tokens, num_blocks * limits.block_size):
        raise ProtocolError(
            f"{where} num_computed_tokens: {seq.num_computed_tokens}, but there are {num_tokens} tokens "
            f"and {num_blocks} blocks of {limits.block_size}"
        )
    if seq.num_in_host * limits.block_size > seq.num_computed_tokens or seq.num_in_host > num_blocks:
        raise ProtocolError(
            f"{where} num_in_host: {seq.num_in_host}, but there are {num_blocks} blocks, "
            f"and {seq.num_computed_tokens} tokens have KV"
        )
    _check_sampling(seq.sampling, limits, f"{where} sampling.")
    return SlotState.of_init(seq)


def _check_sampling(sampling: SeqSampling, limits: Limits, where: str) -> None:
    """Values that are not numbers would spoil neighbouring rows. (Suppressed ids outside the vocabulary have no
    effect.)"""
    is_valid = {
        "temperature": 0 <= sampling.temperature < math.inf,
        "top_p": 0 < sampling.top_p <= 1,
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": 0 < sampling.repetition_penalty < math.inf,
        "presence_penalty": math.isfinite(sampling.presence_penalty),
        "frequency_penalty": math.isfinite(sampling.frequency_penalty),
        "logit_bias": all(map(math.isfinite, sampling.logit_bias.values())),
        "logprobs": sampling.logprobs <= MAX_LOGPROBS,
        "prompt_logprobs": sampling.prompt_logprobs <= MAX_LOGPROBS,
        "grammar": not sampling.HasField("grammar") or len(sampling.grammar.eos_token_ids) > 0,
    }
    for field, valid in is_valid.items():
        if not valid:
            raise ProtocolError(f"{where}{field}: {getattr(sampling, field)} cannot be")
    _check_token_ids(list(sampling.logit_bias), limits, f"{where}logit_bias")
    _check_token_ids(sampling.grammar.eos_token_ids, limits, f"{where}grammar.eos_token_ids")


def _check_fork(fork: Fork, parent: SlotState, limits: Limits, where: str) -> SlotState:
    length, block_size = fork.length, limits.block_size
    branch = parent.fork(length, block_size)
    if parent.is_void or (parent.fell_short and length > parent.length):
        return branch
    if not parent.num_prompt <= length <= parent.length:
        raise ProtocolError(
            f"{where} length: {length}, must be {parent.num_prompt} (prompt) to {parent.length} (the parent's tokens)"
        )
    if length // block_size > parent.num_blocks:
        raise ProtocolError(
            f"{where} length: {length} fills {length // block_size} blocks of {block_size}, "
            f"but the parent has {parent.num_blocks}"
        )
    _check_new_blocks(branch.num_blocks, fork.new_block_ids, limits, f"{where} new_block_ids")
    branch.add_blocks(len(fork.new_block_ids))
    if branch.num_computed > branch.num_blocks * block_size:
        raise ProtocolError(
            f"{where} new_block_ids: {branch.num_computed} tokens have KV, "
            f"but the block table has {branch.num_blocks} blocks of {block_size}"
        )
    return branch


def _change(row: Row, state: SlotState, limits: Limits, where: str) -> None:
    """Check and apply the row's crop, tokens and blocks."""
    if row.HasField("crop_len"):
        if not state.num_prompt <= row.crop_len <= state.length:
            raise ProtocolError(
                f"{where} crop_len: {row.crop_len}, must be {state.num_prompt} (prompt) to {state.length} (history)"
            )
        state.crop(row.crop_len)
    if row.append_token_ids:
        _check_token_ids(row.append_token_ids, limits, f"{where} append_token_ids")
        state.give(len(row.append_token_ids))
        if state.length > limits.max_model_len:
            raise ProtocolError(
                f"{where} append_token_ids: make {state.length} tokens, more than max_model_len {limits.max_model_len}"
            )
    if row.host_slots:
        _check_host_slots(row.host_slots, limits, f"{where} host_slots")
        state.move_to_host(len(row.host_slots))
        if state.num_in_host * limits.block_size > state.num_computed:
            raise ProtocolError(
                f"{where} host_slots: make {state.num_in_host} full blocks, but {state.num_computed} tokens have KV"
            )
    if row.new_block_ids:
        _check_new_blocks(state.num_blocks, row.new_block_ids, limits, f"{where} new_block_ids")
        state.add_blocks(len(row.new_block_ids))


def _check_chunk(row: Row, state: SlotState, where: str) -> bool:
    """Whether the chunk reaches the end of the history."""
    if row.chunk_len > state.num_missing:
        raise ProtocolError(
            f"{where} chunk_len: {row.chunk_len}, but only {state.num_missing} of {state.length} tokens have no KV yet"
        )
    return row.chunk_len > 0 and row.chunk_len == state.num_missing


def _check_blocks(num_tokens: int, state: SlotState, limits: Limits, where: str) -> None:
    end = state.num_computed + num_tokens
    if num_tokens and end > state.num_blocks * limits.block_size:
        raise ProtocolError(
            f"{where} new_block_ids: position {end - 1} will be written, "
            f"but the block table has {state.num_blocks} blocks of {limits.block_size}"
        )


def _check_new_blocks(num_blocks: int, block_ids: Sequence[int], limits: Limits, where: str) -> None:
    """Check that `block_ids` may join the `num_blocks` that a seq has."""
    if num_blocks + len(block_ids) > limits.max_blocks:
        raise ProtocolError(
            f"{where}: make {num_blocks + len(block_ids)} blocks, a seq has {limits.max_blocks} at most"
        )
    if block_ids and max(block_ids) >= limits.num_blocks:
        raise ProtocolError(f"{where}: block {max(block_ids)}, must be below {limits.num_blocks}")


def _check_host_slots(host_slots: Sequence[int], limits: Limits, where: str) -> None:
    if host_slots and max(host_slots) >= limits.num_host_slots:
        raise ProtocolError(
            f"{where}: host slot {max(host_slots)}, must be below {limits.num_host_slots}, which attention can read"
        )


def _check_token_ids(token_ids: Sequence[int], limits: Limits, where: str) -> None:
    if token_ids and max(token_ids) >= limits.vocab_size:
        raise ProtocolError(f"{where}: token id {max(token_ids)}, must be below {limits.vocab_size}")
