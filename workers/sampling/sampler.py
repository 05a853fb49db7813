"""Choosing tokens from vocabulary-parallel logits: every rank calls with its shard and gets the same tokens.

Each rank decides from gathered bytes that are the same everywhere, so ranks agree by construction. Every result is a
maximum, a count or an integer sum, so it equals that of one rank with the whole vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echelon.pb.sampling_pb2 import PositionLogprobs
from kernels.native.decoder import Choices
from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.non_finite import screen
from kernels.sampling.probability_mass import MAX_TOKENS, total_mass
from kernels.sampling.sample import sample
from kernels.sampling.sample_top import sample_top
from kernels.sampling.sort_key import pack_sort_key, unpack_sort_key
from kernels.sampling.top_keys import top_values
from kernels.sampling.truncation import Candidates, Truncation, min_p_top_k_threshold, top_p_threshold
from kernels.sampling.truncation_threshold import truncation_threshold
from workers.collectives import Group
from workers.sampling.confidence import confidence_words, confidences
from workers.sampling.logprobs import LogprobRows, position_logprobs
from workers.sampling.rows import SamplingRows
from workers.upload import upload

_NON_FINITE_KEY = torch.iinfo(torch.int64).max  # above the key of every number
_TOP_P_CANDIDATES = 512  # of each shard; a nucleus is rarely larger, and for one that is, the whole row is gathered
_MAX_CANDIDATES = 1024  # of each shard with top_k; beyond, whole rows are gathered; not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """The choice in each row, the same on every rank."""

    token_ids: Tensor  # int64 [num_rows]; 0 where non_finite
    non_finite: Tensor  # bool [num_rows], the raw logits hold NaN or Inf, or a grammar allows no token
    logprobs: Sequence[PositionLogprobs | None] | None  # one per row, None unless requested; None if no row asked
    # int64 [num_rows, num_alternatives]: the runners-up of the choice, best first. If the processors leave fewer
    # tokens, the last one is repeated; void where non_finite.
    alternatives: Tensor | None
    # fp32 [num_rows]: softmax probability of the chosen token at the row's temperature (1 for temperature 0), after
    # penalties, bias and masks, before min-p, top-k and top-p; void where non_finite.
    confidences: Tensor | None

    @staticmethod
    def join(parts: Sequence["SampledRows"]) -> "SampledRows":
        """Join the rows of all parts, which were sampled with the same options."""
        if len(parts) == 1:
            return parts[0]
        return SampledRows(
            token_ids=torch.cat([part.token_ids for part in parts]),
            non_finite=torch.cat([part.non_finite for part in parts]),
            logprobs=_join_logprobs(parts),
            alternatives=_join_optional([part.alternatives for part in parts]),
            confidences=_join_optional([part.confidences for part in parts]),
        )

    @staticmethod
    def of_choices(choices: Choices) -> "SampledRows":
        """What the native kernels chose."""
        return SampledRows(
            token_ids=choices.token_ids[:, 0].where(choices.is_finite, 0),
            non_finite=~choices.is_finite,
            logprobs=None,
            alternatives=_runners_up(choices.values, choices.token_ids) if choices.values.shape[1] > 1 else None,
            confidences=choices.confidences,
        )


def _join_logprobs(parts: Sequence[SampledRows]) -> list[PositionLogprobs | None] | None:
    if all(part.logprobs is None for part in parts):
        return None
    return [entry for part in parts for entry in part.logprobs or [None] * len(part.token_ids)]


def _join_optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


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
        """Choose a token for each row. Collective: every rank calls with the same rows.

        Args:
            logits_shard: fp32 [num_rows, shard_size], this rank's logits, not changed. All shards have one size;
                columns after the vocabulary are padding and are ignored.
            vocab_start: token id of the first column.
            rows: settings of each row.
            num_alternatives: number of runners-up to return for each row.
            with_confidence: whether to return the probability of each choice.
        """
        raw, non_finite = self._screen(logits_shard, vocab_start)
        processed = raw
        if rows.edits is not None:
            processed = raw.clone()
            rows.edits.apply(processed, vocab_start)
            if rows.edits.void is not None:
                non_finite = non_finite | rows.edits.void
        choice = self._choose(processed, vocab_start, rows, num=1 + num_alternatives)
        words = None
        if with_confidence:
            words = confidence_words(processed, rows.temperature, choice.token_ids[:, 0] - vocab_start).unsqueeze(0)
        winner = torch.zeros_like(non_finite, dtype=torch.int64)
        if self._group.size > 1:
            choice, non_finite, words, winner = self._agree(choice, non_finite, words)
        token_ids = choice.token_ids[:, 0].masked_fill(non_finite, 0)
        return SampledRows(
            token_ids=token_ids,
            non_finite=non_finite,
            logprobs=self._logprobs(raw, vocab_start, rows, token_ids, non_finite) if rows.logprob_rows else None,
            alternatives=_runners_up(choice.values, choice.token_ids) if num_alternatives else None,
            confidences=None if words is None else confidences(words, winner),
        )

    def _choose(self, logits: Tensor, vocab_start: int, rows: SamplingRows, *, num: int) -> "_Choice":
        """The best `num` tokens of this shard."""
        thresholds = self._thresholds(logits, rows)
        if num > 1:
            found = sample_top(
                logits, rows.temperature, rows.keys, num=num, first_token_id=vocab_start, thresholds=thresholds
            )
            return _Choice(*found)
        values, token_ids = sample(
            logits, rows.temperature, rows.keys, first_token_id=vocab_start, thresholds=thresholds
        )
        return _Choice(values.unsqueeze(1), token_ids.unsqueeze(1))

    def _agree(
        self, choice: "_Choice", non_finite: Tensor, words: Tensor | None
    ) -> tuple["_Choice", Tensor, Tensor | None, Tensor]:
        """The best tokens of all shards, and the rank that has the best one. `words` [1, ...] become those of all."""
        num = choice.values.shape[1]
        sent = torch.where(non_finite.unsqueeze(1), _NON_FINITE_KEY, pack_sort_key(choice.values, choice.token_ids))
        if words is not None:
            sent = torch.cat((sent, words[0]), dim=1)
        gathered = self._group.all_gather(sent)  # [tp_size, num_rows, num (+ 2 with words)]
        sort_keys = gathered[:, :, :num]
        best_keys, winner = sort_keys[:, :, 0].max(dim=0)  # [num_rows]
        if num == 1:
            best = best_keys.unsqueeze(1)
        else:
            best = sort_keys.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values[:, :num]
        agreed = _Choice(*unpack_sort_key(best))
        return agreed, best_keys == _NON_FINITE_KEY, None if words is None else gathered[:, :, num:], winner

    def prompt_logprobs(
        self, logits_shard: Tensor, vocab_start: int, next_token_ids: Tensor, num_top: int
    ) -> list[PositionLogprobs]:
        """Logprobs of given tokens. Collective.

        Args:
            logits_shard: fp32 [num_rows, shard_size], as for `sample`.
            next_token_ids: int64 [num_rows], the token that follows in the prompt.
            num_top: most likely tokens besides it.
        Returns:
            One for each row; NaN where the logits hold NaN or Inf.
        """
        raw, non_finite = self._screen(logits_shard, vocab_start)
        non_finite = self._group.all_gather(non_finite.to(torch.uint8)).amax(dim=0) > 0
        raw = raw.masked_fill(non_finite.unsqueeze(1), 0.0)
        wanted = LogprobRows(token_ids=next_token_ids, num_top=[num_top] * raw.shape[0], non_finite=non_finite)
        return position_logprobs(self._group, raw, wanted, vocab_start=vocab_start, vocab_size=self._vocab_size)

    def _screen(self, logits: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
        """Logits with -Inf as padding, and which rows are not finite in this shard."""
        shard_size = logits.shape[1]
        num_valid = min(max(self._vocab_size - vocab_start, 0), shard_size)
        if num_valid == shard_size:
            return screen(logits)
        padded = torch.full_like(logits, -torch.inf)
        if num_valid == 0:
            return padded, torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        padded[:, :num_valid], non_finite = screen(logits[:, :num_valid])
        return padded, non_finite

    def _thresholds(self, logits: Tensor, rows: SamplingRows) -> Tensor | None:
        """The threshold of min-p, top-k and top-p for each row, fp32 [num_rows]; None if they are off."""
        truncated = rows.truncated_rows
        if rows.truncation is None or truncated is None:
            return None
        if len(truncated) == logits.shape[0]:
            return self.truncation_thresholds(logits, rows.temperature, rows.truncation)
        found = self.truncation_thresholds(logits[truncated], rows.temperature[truncated], rows.truncation)
        return torch.full_like(rows.temperature, -torch.inf).index_copy_(0, truncated, found)

    def truncation_thresholds(self, logits: Tensor, temperature: Tensor, truncation: Truncation) -> Tensor:
        """Thresholds of rows over the whole vocabulary. Several shards first exchange candidates, then all logits of
        the rows that the candidates do not settle."""
        if self._group.size == 1:
            return truncation_threshold(logits, temperature, truncation)
        thresholds, covered = self._from_candidates(scale_by_temperature(logits, temperature), truncation)
        open_rows = (~covered).nonzero().squeeze(1)
        if open_rows.numel():
            gathered = self._group.all_gather(logits[open_rows])  # [tp_size, num_open_rows, shard_size]
            thresholds[open_rows] = truncation_threshold(
                gathered.transpose(0, 1).flatten(1), temperature[open_rows], truncation.select(open_rows)
            )
        return thresholds

    def _from_candidates(self, scaled: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor]:
        """Thresholds [num_rows] from the largest logits of each shard, and which of them are proven."""
        num_candidates = max(truncation.max_top_k, _TOP_P_CANDIDATES if truncation.has_top_p else 1)
        candidates = self._gather_candidates(scaled, min(num_candidates, _MAX_CANDIDATES, scaled.shape[1]))
        thresholds, covered = min_p_top_k_threshold(candidates, truncation)
        if truncation.has_top_p:
            shard_mass = total_mass(scaled, candidates.values[:, 0].contiguous(), thresholds)
            mass = self._group.all_gather(shard_mass).sum(dim=0)
            thresholds, top_p_covered = top_p_threshold(candidates, truncation, thresholds, mass)
            covered = covered & top_p_covered
        return thresholds, covered

    def _gather_candidates(self, scaled: Tensor, num_candidates: int) -> Candidates:
        gathered = self._group.all_gather(top_values(scaled, num_candidates))  # [tp_size, num_rows, num_candidates]
        rest = gathered[:, :, -1].amax(dim=0)
        if num_candidates == scaled.shape[1]:
            rest = torch.full_like(rest, -torch.inf)
        values = gathered.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        return Candidates(values=values, rest=rest)

    def _logprobs(
        self, raw: Tensor, vocab_start: int, rows: SamplingRows, token_ids: Tensor, non_finite: Tensor
    ) -> list[PositionLogprobs | None]:
        index = upload(rows.logprob_rows, torch.int64, raw.device)
        logits = raw[index].masked_fill(non_finite[index].unsqueeze(1), 0.0)
        wanted = LogprobRows(token_ids=token_ids[index], num_top=rows.num_logprobs, non_finite=non_finite[index])
        found = position_logprobs(self._group, logits, wanted, vocab_start=vocab_start, vocab_size=self._vocab_size)
        result: list[PositionLogprobs | None] = [None] * raw.shape[0]
        for row, logprobs in zip(rows.logprob_rows, found, strict=True):
            result[row] = logprobs
        return result


@dataclass(frozen=True, slots=True)
class _Choice:
    """The best tokens of each row, best first; a value of -Inf if there are no more."""

    values: Tensor  # fp32 [num_rows, num]
    token_ids: Tensor  # int64 [num_rows, num]


def _runners_up(values: Tensor, token_ids: Tensor) -> Tensor:
    """Token ids [num_rows, num - 1] of all but the best, the last one repeated."""
    num = values.shape[1]
    last = (values > -torch.inf).sum(dim=1, keepdim=True).clamp(min=1) - 1
    columns = torch.arange(1, num, device=last.device).clamp(max=last)  # [num_rows, num - 1]
    return token_ids.gather(1, columns)
