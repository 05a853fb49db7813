"""Choosing tokens from vocabulary-parallel logits: every rank calls with its shard and gets the same tokens.

What each rank decides it computes from gathered bytes that are the same everywhere, so ranks agree by construction.
And everything is a maximum, a count or an integer sum, so the result is that of one rank with the whole vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echelon.pb.sampling_pb2 import PositionLogprobs
from kernels.probability_mass import MAX_TOKENS, total_mass
from kernels.sample import sample, scale_by_temperature
from kernels.sample_top import sample_top
from kernels.sort_key import pack_sort_key, unpack_sort_key
from kernels.truncation import Candidates, Truncation, min_p_top_k_threshold, top_p_threshold
from workers.confidence import NUM_WORDS, confidence_words, confidences
from workers.groups import Group
from workers.logprobs import LogprobRows, position_logprobs
from workers.sampling_rows import RowEntry, SamplingRows
from workers.sampling_state import SeqSamplingState

__all__ = ["RowEntry", "SampledRows", "Sampler", "SamplingRows", "SeqSamplingState"]

NON_FINITE_KEY = torch.iinfo(torch.int64).max  # above the key of every number
TOP_P_CANDIDATES = 512  # of each shard; a nucleus is rarely larger, and if it is the whole row is gathered
MAX_CANDIDATES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """The choice in each row, the same on every rank."""

    token_ids: Tensor  # int64 [num_rows]; 0 where non_finite
    non_finite: Tensor  # bool [num_rows], the raw logits hold NaN or Inf
    logprobs: Sequence[PositionLogprobs | None] | None  # a row each, None unless asked for; None if no row asked
    # int64 [num_rows, num_alternatives]: the runners-up of the choice, best first. Where the processors leave fewer
    # tokens the last one is repeated; void where non_finite.
    alternatives: Tensor | None
    # fp32 [num_rows]: softmax probability of the chosen token at the row's temperature, at temperature 0 at 1, behind
    # penalties, bias and masks, before min-p, top-k and top-p; void where non_finite.
    confidences: Tensor | None


class Sampler:
    """Stateless but for the group and the vocabulary."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        if not 0 < vocab_size < MAX_TOKENS:
            raise ValueError(f"vocab_size must be between 1 and {MAX_TOKENS - 1}, got {vocab_size}")
        self._group = group
        self._vocab_size = vocab_size

    def sample(
        self,
        logits_shard: Tensor,
        vocab_start: int,
        rows: SamplingRows,
        *,
        num_alternatives: int = 0,
        with_confidence: bool = False,
    ) -> SampledRows:
        """Chooses a token for each row. Collective: every rank calls with the same rows.

        Args:
            logits_shard: fp32 [num_rows, shard_size], this rank's logits, not changed. All shards have one size; what
                lies beyond the vocabulary is padding and is not looked at.
            vocab_start: token id of the first column.
            rows: settings of each row.
            num_alternatives: runners-up that are wanted of each row.
            with_confidence: whether the probability of each choice is wanted.
        """
        raw, non_finite = self._screen(logits_shard, vocab_start)
        processed = raw
        if rows.edits is not None:
            processed = raw.clone()
            rows.edits.apply(processed, vocab_start, min(vocab_start + raw.shape[1], self._vocab_size))
        values, token_ids = self._choose(processed, vocab_start, rows, num=1 + num_alternatives)
        words = torch.where(non_finite.unsqueeze(1), NON_FINITE_KEY, pack_sort_key(values, token_ids))
        if with_confidence:
            columns = token_ids[:, 0] - vocab_start
            words = torch.cat((words, confidence_words(processed, rows.temperature, columns)), dim=1)
        gathered = self._group.all_gather(words)  # [tp_size, num_rows, 1 + num_alternatives (+ NUM_WORDS)]
        best_keys, winner = gathered[:, :, 0].max(dim=0)  # [num_rows]
        non_finite = best_keys == NON_FINITE_KEY
        token_ids = torch.where(non_finite, 0, unpack_sort_key(best_keys)[1])
        return SampledRows(
            token_ids=token_ids,
            non_finite=non_finite,
            logprobs=self._logprobs(raw, vocab_start, rows, token_ids, non_finite) if rows.logprob_rows else None,
            alternatives=_runners_up(gathered[:, :, : 1 + num_alternatives]) if num_alternatives else None,
            confidences=confidences(gathered[:, :, -NUM_WORDS:], winner) if with_confidence else None,
        )

    def _choose(self, logits: Tensor, vocab_start: int, rows: SamplingRows, *, num: int) -> tuple[Tensor, Tensor]:
        """The best `num` tokens of this shard with their values, both [num_rows, num]."""
        if rows.all_greedy and num == 1:
            best = logits.max(dim=1, keepdim=True)  # documented to give the first of equal maxima
            return best.values, best.indices + vocab_start
        kept = logits if rows.all_greedy else self._truncate(logits, rows)
        if num > 1:
            return sample_top(kept, rows.temperature, rows.keys, num=num, first_token_id=vocab_start)
        values, token_ids = sample(kept, rows.temperature, rows.keys, first_token_id=vocab_start)
        return values.unsqueeze(1), token_ids.unsqueeze(1)

    def prompt_logprobs(
        self, logits_shard: Tensor, vocab_start: int, next_token_ids: Tensor, num_top: int
    ) -> list[PositionLogprobs]:
        """Logprobs of given tokens. Collective.

        Args:
            logits_shard: fp32 [num_rows, shard_size], as for `sample`.
            next_token_ids: int64 [num_rows], the token that follows in the prompt.
            num_top: most likely tokens beside it.
        Returns:
            One for each row; NaN where the logits hold NaN or Inf.
        """
        raw, non_finite = self._screen(logits_shard, vocab_start)
        non_finite = self._group.all_gather(non_finite.to(torch.uint8)).amax(dim=0) > 0
        wanted = LogprobRows(token_ids=next_token_ids, num_top=[num_top] * raw.shape[0], non_finite=non_finite)
        return position_logprobs(self._group, raw, wanted, vocab_start=vocab_start, vocab_size=self._vocab_size)

    def _screen(self, logits: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
        """Logits without NaN and Inf but for -Inf as padding, and which rows held any (of this shard)."""
        num_rows, shard_size = logits.shape
        num_valid = min(max(self._vocab_size - vocab_start, 0), shard_size)
        if num_valid < shard_size:
            logits = logits.clone()
            logits[:, num_valid:] = -torch.inf
        if num_valid == 0:
            return logits, torch.zeros(num_rows, dtype=torch.bool, device=logits.device)
        valid = logits[:, :num_valid]
        non_finite = ~(valid.amin(dim=1).isfinite() & valid.amax(dim=1).isfinite())  # NaN spreads in both
        if non_finite.any():
            logits = logits.masked_fill(non_finite.unsqueeze(1), 0.0)
        return logits, non_finite

    def _truncate(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """Logits without what min-p, top-k and top-p exclude."""
        if rows.truncation is None or rows.truncated_rows is None:
            return logits
        all_rows = len(rows.truncated_rows) == logits.shape[0]
        subject = logits if all_rows else logits[rows.truncated_rows]  # [num_truncated, shard_size]
        scaled = scale_by_temperature(subject, rows.temperature[rows.truncated_rows])
        thresholds = self._thresholds(scaled, rows.truncation)
        subject = subject.masked_fill(scaled < thresholds.unsqueeze(1), -torch.inf)
        return subject if all_rows else logits.index_copy(0, rows.truncated_rows, subject)

    def _thresholds(self, scaled: Tensor, truncation: Truncation) -> Tensor:
        """Thresholds of rows over the whole vocabulary: first from the shards' candidates, then, for the rows that
        these do not settle, from all their logits."""
        num_candidates = max(truncation.max_top_k, TOP_P_CANDIDATES if truncation.has_top_p else 1)
        thresholds, covered = self._thresholds_from(scaled, truncation, min(num_candidates, MAX_CANDIDATES))
        open_rows = (~covered).nonzero().squeeze(1)
        if open_rows.numel():
            complete, _ = self._thresholds_from(
                scaled[open_rows], truncation.select(open_rows), num_candidates=scaled.shape[1]
            )
            thresholds[open_rows] = complete
        return thresholds

    def _thresholds_from(self, scaled: Tensor, truncation: Truncation, num_candidates: int) -> tuple[Tensor, Tensor]:
        """Thresholds [num_rows] from so many candidates of each shard, and which of them are proven."""
        candidates = self._gather_candidates(scaled, num_candidates)
        thresholds, covered = min_p_top_k_threshold(candidates, truncation)
        if truncation.has_top_p:
            shard_mass = total_mass(scaled, candidates.values[:, 0], thresholds)
            mass = self._group.all_gather(shard_mass).sum(dim=0)
            thresholds, top_p_covered = top_p_threshold(candidates, truncation, thresholds, mass)
            covered = covered & top_p_covered
        return thresholds, covered

    def _gather_candidates(self, scaled: Tensor, num_candidates: int) -> Candidates:
        num_candidates = min(num_candidates, scaled.shape[1])
        local = scaled.topk(num_candidates, dim=1).values
        gathered = self._group.all_gather(local)  # [tp_size, num_rows, num_candidates]
        rest = gathered[:, :, -1].amax(dim=0)
        if num_candidates == scaled.shape[1]:
            rest = torch.full_like(rest, -torch.inf)
        values = gathered.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        return Candidates(values=values, rest=rest)

    def _logprobs(
        self, raw: Tensor, vocab_start: int, rows: SamplingRows, token_ids: Tensor, non_finite: Tensor
    ) -> list[PositionLogprobs | None]:
        index = torch.tensor(rows.logprob_rows, device=raw.device)
        wanted = LogprobRows(token_ids=token_ids[index], num_top=rows.num_logprobs, non_finite=non_finite[index])
        found = position_logprobs(self._group, raw[index], wanted, vocab_start=vocab_start, vocab_size=self._vocab_size)
        result: list[PositionLogprobs | None] = [None] * raw.shape[0]
        for row, logprobs in zip(rows.logprob_rows, found, strict=True):
            result[row] = logprobs
        return result


def _runners_up(sort_keys: Tensor) -> Tensor:
    """Token ids [num_rows, num - 1] of all but the best, of the shards' keys [tp_size, num_rows, num]."""
    num = sort_keys.shape[2]
    best = sort_keys.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values[:, :num]
    values, token_ids = unpack_sort_key(best)
    last = (values > -torch.inf).sum(dim=1, keepdim=True).clamp(min=1) - 1
    columns = torch.arange(1, num, device=best.device).clamp(max=last)  # [num_rows, num - 1]
    return token_ids.gather(1, columns)
