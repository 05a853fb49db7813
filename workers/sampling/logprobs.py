"""Log-softmax of raw logits at chosen tokens, with rank and the most likely tokens, over a sharded vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echelon.pb.sampling_pb2 import PositionLogprobs, TokenLogprob
from kernels.sampling.probability_mass import MASS_BITS, mass_and_rank
from kernels.sampling.sort_key import pack_sort_key, unpack_sort_key
from kernels.sampling.top_keys import top_sort_keys
from workers.collectives import Group

_MAX_LOGITS_AT_ONCE = 1 << 22  # bounds the 8-byte temporaries of a long prompt chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """What each row asks for."""

    token_ids: Tensor  # int64 [num_rows], the chosen tokens
    num_top: Sequence[int]
    non_finite: Tensor  # bool [num_rows]: the answer is NaN


def position_logprobs(
    group: Group, logits: Tensor, wanted: LogprobRows, *, vocab_start: int, vocab_size: int
) -> list[PositionLogprobs]:
    """Logprobs of each row, with the same bits for every tp_size and batch. Collective.

    Args:
        logits: fp32 [num_rows, shard_size], without NaN; -Inf beyond the vocabulary.
        vocab_start: token id of the first column.
    """
    num_rows, shard_size = logits.shape
    rows_at_once = max(1, _MAX_LOGITS_AT_ONCE // shard_size)
    num_top = min(max(1, *wanted.num_top), vocab_size) if num_rows else 1
    result: list[PositionLogprobs] = []
    non_finite = wanted.non_finite.tolist()
    for start in range(0, num_rows, rows_at_once):
        end = min(start + rows_at_once, num_rows)
        result += _chunk_logprobs(
            group, logits[start:end], wanted.token_ids[start:end], num_top=num_top, vocab_start=vocab_start
        )
    for logprobs, num_wanted, is_void in zip(result, wanted.num_top, non_finite, strict=True):
        del logprobs.top[num_wanted:]
        if is_void:
            _make_void(logprobs)
    return result


def _chunk_logprobs(
    group: Group, logits: Tensor, token_ids: Tensor, *, num_top: int, vocab_start: int
) -> list[PositionLogprobs]:
    shard_size = logits.shape[1]
    column = token_ids - vocab_start
    owned = (column >= 0) & (column < shard_size)
    own_logit = logits.gather(1, column.clamp(0, shard_size - 1).unsqueeze(1)).squeeze(1)
    own_key = pack_sort_key(torch.where(owned, own_logit, -torch.inf), token_ids)
    best = top_sort_keys(logits, num_top, first_token_id=vocab_start)
    gathered = group.all_gather(torch.cat((own_key.unsqueeze(1), best), dim=1))  # [tp_size, num_rows, 1 + num_top]
    chosen = unpack_sort_key(gathered[:, :, 0].amax(dim=0))[0]  # [num_rows]
    best = gathered[:, :, 1:].transpose(0, 1).flatten(1).sort(dim=1, descending=True).values[:, :num_top]
    top_logits, top_ids = unpack_sort_key(best)

    sums = mass_and_rank(logits, top_logits[:, 0].contiguous(), chosen)
    mass, num_better = group.all_gather(sums).sum(dim=0).unbind(dim=0)
    # One logarithm a row, in fp64 on the host: tensor libraries differ in the last bits.
    largest = top_logits[:, 0].tolist()
    log_sum = [x + math.log(m) - MASS_BITS * math.log(2) for x, m in zip(largest, mass.tolist(), strict=True)]
    columns = (token_ids, chosen, num_better, top_ids, top_logits)
    return [
        PositionLogprobs(
            chosen=TokenLogprob(token_id=token_id, logprob=logit - total, rank=better + 1),
            top=[
                TokenLogprob(token_id=top_id, logprob=top_logit - total, rank=1 + sum(x > top_logit for x in tops))
                for top_id, top_logit in zip(ids, tops, strict=True)
            ],
        )
        for total, token_id, logit, better, ids, tops in zip(
            log_sum, *(column.tolist() for column in columns), strict=True
        )
    ]


def _make_void(logprobs: PositionLogprobs) -> None:
    for entry in (logprobs.chosen, *logprobs.top):
        entry.logprob = math.nan
        entry.rank = 0
