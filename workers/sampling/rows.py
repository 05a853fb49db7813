"""The positions of a batch that need a token, as tensors."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.native.sampling import ROW_SETTINGS, RowSettings
from kernels.sampling.noise_keys import NoiseKeys
from kernels.sampling.penalties import apply_bias, apply_mask, apply_penalties
from kernels.sampling.token_bits import apply_token_bits
from kernels.sampling.truncation import Truncation
from workers.sampling.grammar import GrammarError, TokenBits
from workers.sampling.state import SeqSamplingState
from workers.upload import upload


@dataclass(frozen=True, slots=True)
class RowEntry:
    """One row of logits, which decides the token at `position` of a seq."""

    state: SeqSamplingState
    position: int  # absolute
    hypothetical: Sequence[int]  # drafted tokens between the history in `state` and the position


@dataclass(frozen=True, slots=True)
class TokenEntries:
    """Single logits of a batch, identified by row and token, each with one or more numbers."""

    rows: Tensor  # int64 [num_entries]
    token_ids: Tensor  # int64 [num_entries], of the whole vocabulary
    values: tuple[Tensor, ...] = ()  # [num_entries] each

    @staticmethod
    def collect(parts: Sequence[tuple[int, tuple[NDArray[Any], ...]]], device: torch.device) -> "TokenEntries | None":
        """Join (row, (token_ids, *values)) of the rows that have any."""
        parts = [(row, columns) for row, columns in parts if len(columns[0])]
        if not parts:
            return None
        rows = np.repeat([row for row, _ in parts], [len(columns[0]) for _, columns in parts])
        joined = [np.concatenate(column) for column in zip(*(columns for _, columns in parts), strict=True)]
        there = [torch.from_numpy(array).to(device, non_blocking=True) for array in (rows, *joined)]
        return TokenEntries(there[0], there[1], tuple(there[2:]))


@dataclass(frozen=True, slots=True)
class GrammarBits:
    """What grammars allow in rows of a batch."""

    rows: Tensor  # int64 [num_entries]
    bits: Tensor  # int32 [num_entries, ceil(vocab_size / 32)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEdits:
    """Penalties, bias and masks of a batch, in the order in which they apply."""

    penalised: TokenEntries | None  # values: seen, output_counts
    penalty_settings: Tensor  # fp32 [num_rows, 3]
    biased: TokenEntries | None  # values: bias
    masked: TokenEntries | None
    allowed: GrammarBits | None = None
    void: Tensor | None = None  # bool [num_rows]: a grammar allows no token

    def apply(self, logits: Tensor, first_token_id: int) -> None:
        """Edit logits [num_rows, num_tokens] in place. The first column is token first_token_id."""
        if self.penalised is not None:
            seen, counts = self.penalised.values
            apply_penalties(
                logits,
                self.penalised.rows,
                self.penalised.token_ids,
                first_token_id=first_token_id,
                seen=seen,
                output_counts=counts,
                settings=self.penalty_settings,
            )
        if self.biased is not None:
            (bias,) = self.biased.values
            apply_bias(logits, self.biased.rows, self.biased.token_ids, bias, first_token_id=first_token_id)
        if self.masked is not None:
            apply_mask(logits, self.masked.rows, self.masked.token_ids, first_token_id=first_token_id)
        if self.allowed is not None:
            apply_token_bits(logits, self.allowed.rows, self.allowed.bits, first_token_id=first_token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """What sampling needs besides the logits. The same on every rank."""

    temperature: Tensor  # fp32 [num_rows], 0 is greedy
    keys: NoiseKeys
    edits: LogitEdits | None
    truncated_rows: Tensor | None  # int64 [num_truncated]
    truncation: Truncation | None  # of these
    logprob_rows: tuple[int, ...]  # ascending
    num_logprobs: tuple[int, ...]  # of these: top-n besides the chosen token

    @staticmethod
    def build(entries: Sequence[RowEntry], device: torch.device) -> "SamplingRows":
        """Takes a few Python steps per row, and more only for rows that need them."""
        states = [entry.state for entry in entries]
        keys = _integers(
            device,
            (state.seed for state in states),
            (state.sample_index for state in states),
            (entry.position for entry in entries),
        )
        truncated = [row for row, state in enumerate(states) if state.truncates]
        asking = [(row, state.logprobs) for row, state in enumerate(states) if state.logprobs is not None]
        edits_logits = any(entry.state.edits_logits_at(entry.position) for entry in entries)
        return SamplingRows(
            temperature=upload([state.temperature for state in states], torch.float32, device),
            keys=NoiseKeys(seeds=keys[0], sample_indices=keys[1], positions=keys[2]),
            edits=_logit_edits(entries, device) if edits_logits else None,
            truncated_rows=upload(truncated, torch.int64, device) if truncated else None,
            truncation=_truncation([states[row] for row in truncated], device) if truncated else None,
            logprob_rows=tuple(row for row, _ in asking),
            num_logprobs=tuple(num_top for _, num_top in asking),
        )


def native_settings(entries: Sequence[RowEntry]) -> RowSettings | None:
    """What the native kernels need to choose the tokens of these rows; None if some row needs more than temperature,
    noise and truncation."""
    for entry in entries:
        if entry.state.logprobs is not None or entry.state.edits_logits_at(entry.position):
            return None
    return np.array([_native_row(entry.state, entry.position) for entry in entries], dtype=ROW_SETTINGS)


def _native_row(state: SeqSamplingState, position: int) -> tuple[float, ...]:
    truncation = (state.top_k, state.top_p, state.log_min_p) if state.truncates else (0, 1, -math.inf)
    return state.seed, state.sample_index, position, state.temperature, -math.inf, *truncation


def _integers(device: torch.device, *columns: Iterable[int]) -> Tensor:
    rows = [list(column) for column in columns]
    num_rows = len(rows[0])
    padding = [0] * (num_rows % 2)  # columns start at multiples of 16 bytes, else Triton recompiles a kernel
    return upload([row + padding for row in rows], torch.int64, device)[:, :num_rows]


def _truncation(states: Sequence[SeqSamplingState], device: torch.device) -> Truncation:
    def tensor(get: Callable[[SeqSamplingState], float], dtype: torch.dtype) -> Tensor:
        return upload([get(state) for state in states], dtype, device)

    return Truncation(
        log_min_p=tensor(lambda state: state.log_min_p, torch.float32),
        top_k=tensor(lambda state: state.top_k, torch.int64),
        top_p=tensor(lambda state: state.top_p, torch.float64),
        max_top_k=max(state.top_k for state in states),
        has_top_p=any(state.top_p < 1 for state in states),
    )


def _logit_edits(entries: Sequence[RowEntry], device: torch.device) -> LogitEdits:
    editing = [(row, entry) for row, entry in enumerate(entries) if entry.state.edits_logits_at(entry.position)]
    penalised: list[tuple[int, tuple[NDArray[Any], ...]]] = []
    for row, entry in editing:
        counts = entry.state.counts_behind(entry.hypothetical)
        if counts is not None:
            assert entry.state.length + len(entry.hypothetical) == entry.position, (
                f"penalties at position {entry.position} need the {entry.position} tokens before it, got "
                f"{entry.state.length} and {len(entry.hypothetical)} drafts"
            )
            penalised.append((row, (counts.token_ids, counts.seen, counts.output_counts.astype(np.float32))))
    biased = [(row, entry.state.bias) for row, entry in editing]
    masked = [
        (row, (entry.state.suppressed_at(entry.position),)) for row, entry in editing if entry.state.grammar is None
    ]
    settings = [entry.state.penalties for entry in entries]
    allowed, void = _grammar_bits(editing, len(entries), device)
    return LogitEdits(
        penalised=TokenEntries.collect(penalised, device),
        penalty_settings=upload(settings, torch.float32, device),
        biased=TokenEntries.collect(biased, device),
        masked=TokenEntries.collect(masked, device),
        allowed=allowed,
        void=void,
    )


def _grammar_bits(
    editing: Sequence[tuple[int, RowEntry]], num_rows: int, device: torch.device
) -> tuple[GrammarBits | None, Tensor | None]:
    """What the grammars of rows allow, and the rows in which they allow nothing. A device may still be busy with the
    forward meanwhile."""
    rows: list[int] = []
    bits: list[TokenBits] = []
    void: list[int] = []
    for row, entry in editing:
        if entry.state.grammar is None:
            continue
        try:
            own = entry.state.grammar.bits_behind(entry.hypothetical, entry.state.suppressed_at(entry.position))
        except GrammarError:
            void.append(row)
            continue
        if own is not None:
            rows.append(row)
            bits.append(own)
    allowed = None
    if rows:
        there = torch.from_numpy(np.stack(bits)).to(device, non_blocking=True)
        allowed = GrammarBits(upload(rows, torch.int64, device), there)
    return allowed, upload([row in void for row in range(num_rows)], torch.bool, device) if void else None
