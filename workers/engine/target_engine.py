"""The target: prefill chunks, plain decoding and verification of drafts in one packed forward."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from echelon.pb.worker_pb2 import EngineInfo, Round, RowResult
from kernels.sampling.verify_chain import verify_chain
from workers.engine.engine import NO_TOKEN, ActiveRow, ModelEngine, ModelRunner, Mover, chosen_token_ids
from workers.engine.rounds import RowPlan, plan_target
from workers.engine.seq_state import SeqTable
from workers.models.batch import Batch
from workers.sampling.rows import RowEntry
from workers.sampling.sampler import SampledRows
from workers.upload import upload

logger = logging.getLogger(__name__)

_NO_DRAFT = -1
_PlannedRow = tuple[RowPlan, RowResult]


class HostAttention(Protocol):
    """See workers.engine.host_attention."""

    def forward(self, batch: Batch, num_in_host: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Verify:
    """A seq for which this round chooses a token."""

    plan: RowPlan
    result: RowResult
    draft_token_ids: Sequence[int]
    first_row: int  # in the packed batch: the last token of the history, followed by the drafts


class TargetEngine(ModelEngine):
    """See workers.engine.Engine."""

    def __init__(
        self,
        runner: ModelRunner,
        table: SeqTable,
        info: EngineInfo,
        *,
        mover: Mover | None = None,
        host_attention: HostAttention | None = None,
        forced_acceptance: float = 0.0,
    ) -> None:
        """`host_attention`: computes seqs that have blocks in host memory; None: no seq has any.

        `forced_acceptance`: the share of drafts that count as right, whatever they are. For benchmarks only; 0 turns
        it off. Raises ValueError if it is not between 0 and 1."""
        super().__init__(runner, table, info, plan_target, mover)
        if not 0 <= forced_acceptance <= 1:
            raise ValueError(f"engines: forced_acceptance {forced_acceptance} must be between 0 and 1")
        if forced_acceptance:
            logger.warning(
                "forced_acceptance %g: drafts are committed whether they are right or not, so THE OUTPUT IS NOT THE "
                "MODEL'S; only a benchmark may set this",
                forced_acceptance,
            )
        self._forced_acceptance = forced_acceptance
        self._host_attention = host_attention

    def _run_rows(self, round_: Round, active: list[ActiveRow]) -> int:
        for each in active:
            if num_drafts := each.plan.num_drafts:
                self._table.put_drafts(each.plan.slot, each.row.draft_token_ids[:num_drafts])
                each.result.num_verified_tokens = num_drafts
        rows = [(self._without_illegal(each.plan), each.result) for each in active]
        return sum(map(self._step, self._together(rows)))

    def _together(self, rows: list[_PlannedRow]) -> list[list[_PlannedRow]]:
        """The rows by forwards: a seq with blocks in host memory has one of its own."""
        if self._host_attention is None:
            return [rows]
        in_host = self._table.num_in_host[[plan.slot for plan, _ in rows]] > 0
        others = [row for row, is_in_host in zip(rows, in_host, strict=True) if not is_in_host]
        alone = [[row] for row, is_in_host in zip(rows, in_host, strict=True) if is_in_host]
        return [others, *alone] if others else alone

    def _forward(self, slots: list[int], batch: Batch) -> Tensor:
        num_in_host = int(self._table.num_in_host[slots[0]])
        if not num_in_host:
            return self._runner.forward(batch)
        assert self._host_attention is not None, "rounds are checked"
        return self._host_attention.forward(batch, num_in_host)

    def _without_illegal(self, plan: RowPlan) -> RowPlan:
        """Drafts that leave the seq's grammar are rejected before they cost anything."""
        grammar = self._table.sampling(plan.slot).grammar
        if grammar is None or not plan.num_drafts:
            return plan
        return replace(plan, num_drafts=grammar.num_legal(self._table.drafts(plan.slot, plan.num_drafts)))

    def _step(self, active: list[_PlannedRow]) -> int:
        """Run all rows in one forward, and rows spoiled by their drafts in a second. Returns the number of forwards."""
        table = self._table
        slots = [plan.slot for plan, _ in active]
        counts = [plan.chunk_len + plan.num_drafts for plan, _ in active]
        with self._runner.tracer.span(_step_name([plan for plan, _ in active])):
            hidden = self._forward(slots, table.pack(slots, counts))
        verifies = []
        for (plan, result), end in zip(active, accumulate(counts), strict=True):
            first_row = end - plan.num_drafts - 1
            if table.num_prompt_logprobs[plan.slot] is not None:
                self._prompt_logprobs(plan, hidden[first_row + 1 - plan.chunk_len : first_row + 1], result)
            if plan.at_end:
                verifies.append(_Verify(plan, result, table.drafts(plan.slot, plan.num_drafts), first_row))
        table.num_computed[slots] += [plan.chunk_len for plan, _ in active]
        spoiled = self._verify(hidden, verifies) if verifies else []
        return 1 + (self._step([self._undo(seq) for seq in spoiled]) if spoiled else 0)

    def _undo(self, seq: _Verify) -> _PlannedRow:
        """The row without its drafts. Attention hides later tokens with a factor of 0, which does not hide NaN, and a
        stream must not depend on its drafts."""
        self._table.num_computed[seq.plan.slot] -= seq.plan.chunk_len
        seq.result.Clear()
        seq.result.slot = seq.plan.slot
        return replace(seq.plan, num_drafts=0), seq.result

    def _verify(self, hidden: Tensor, verifies: list[_Verify]) -> list[_Verify]:
        """Choose a token at each position after a history and its drafts; commit drafts as far as they agree. Returns
        the seqs with drafts whose logits were not finite; nothing was committed for them."""
        cu_rows = [0, *accumulate(len(seq.draft_token_ids) + 1 for seq in verifies)]
        sampled, verdicts = self._verdicts(hidden, verifies, cu_rows)
        committing, spoiled = [], []
        for seq, row, (num_accepted, next_token_id) in zip(verifies, cu_rows[:-1], verdicts, strict=True):
            if next_token_id != NO_TOKEN:
                self._fill_in(seq, num_accepted, next_token_id)
                committing.append(seq)
                if sampled.logprobs is not None:
                    logprobs = sampled.logprobs[row : row + num_accepted + 1]
                    seq.result.logprobs.extend(entry for entry in logprobs if entry is not None)
            elif seq.draft_token_ids:
                spoiled.append(seq)
            else:
                self._refuse(seq)
                self._table.num_computed[seq.plan.slot] -= 1  # the next row computes the last token again
        if committing:
            slots = [seq.plan.slot for seq in committing]
            self._table.append(slots, [seq.result.token_ids for seq in committing])
            # Of the committed tokens only the last has no KV yet.
            self._table.num_computed[slots] += [seq.result.num_accepted_tokens for seq in committing]
        return spoiled

    def _verdicts(
        self, hidden: Tensor, verifies: list[_Verify], cu_rows: list[int]
    ) -> tuple[SampledRows, list[list[int]]]:
        """The choices, and for each seq the number of drafts that they confirm and the token that follows these."""
        rows: list[int] = []
        entries: list[RowEntry] = []
        draft_token_ids: list[int] = []
        for seq in verifies:
            sampling, chain = self._table.sampling(seq.plan.slot), seq.draft_token_ids
            rows.extend(range(seq.first_row, seq.first_row + len(chain) + 1))
            entries.extend(
                RowEntry(sampling, sampling.length + depth, chain[:depth]) for depth in range(len(chain) + 1)
            )
            draft_token_ids.extend(chain)
            draft_token_ids.append(_NO_DRAFT)
        device = self._runner.device
        sampled = self._runner.choose(hidden[upload(rows, torch.int64, device)], entries)
        choices, drafts = chosen_token_ids(sampled), upload(draft_token_ids, torch.int64, device)
        if self._forced_acceptance:
            choices, drafts = force_acceptance(choices, drafts, entries, self._forced_acceptance)
        num_accepted, next_token_ids = verify_chain(choices, drafts, upload(cu_rows, torch.int64, device))
        return sampled, torch.stack((num_accepted, next_token_ids), dim=1).tolist()

    def _fill_in(self, seq: _Verify, num_accepted: int, next_token_id: int) -> None:
        result = seq.result
        result.num_accepted_tokens = num_accepted
        result.token_ids.extend(seq.draft_token_ids[:num_accepted])
        result.token_ids.append(next_token_id)

    def _refuse(self, seq: _Verify) -> None:
        """Say why no token could be chosen."""
        grammar = self._table.sampling(seq.plan.slot).grammar
        error = "" if grammar is None else grammar.error()
        seq.result.grammar_error = error
        seq.result.non_finite = not error

    def _prompt_logprobs(self, plan: RowPlan, hidden: Tensor, result: RowResult) -> None:
        """Logprobs of the prompt tokens that follow the chunk's positions; hidden [chunk_len, hidden_size]."""
        table, slot = self._table, plan.slot
        num_top = table.num_prompt_logprobs[slot]
        start = int(table.num_computed[slot]) + 1  # the first position that this chunk predicts
        end = min(start + plan.chunk_len, int(table.num_prompt[slot]))
        if num_top is None or start >= end:
            return
        result.prompt_logprobs_start = start
        next_token_ids = torch.from_numpy(table.token_ids[slot, start:end]).to(self._runner.device, torch.int64)
        result.prompt_logprobs.extend(self._runner.prompt_logprobs(hidden[: end - start], next_token_ids, num_top))


def force_acceptance(
    choices: Tensor, draft_token_ids: Tensor, entries: Sequence[RowEntry], rate: float
) -> tuple[Tensor, Tensor]:
    """Choices and drafts, int64 [num_rows] each, changed so that they agree with probability `rate`.

    Only seed and position of a row decide, so every rank, and a second run, decides alike. NO_TOKEN and _NO_DRAFT stay
    as they are.
    """
    draws = [random.Random(f"{entry.state.seed} {entry.position}").random() for entry in entries]
    agree = torch.tensor(draws, dtype=torch.float64, device=choices.device) < rate
    decides = (draft_token_ids != _NO_DRAFT) & (choices != NO_TOKEN)
    forced = torch.where(agree & decides, draft_token_ids, choices)
    return forced, torch.where(agree & decides, draft_token_ids, _NO_DRAFT)


def _step_name(plans: Sequence[RowPlan]) -> str:
    """The name of a forward of all these rows in a trace."""
    if any(plan.num_drafts for plan in plans):
        return "verify"
    return "prefill" if any(plan.chunk_len > 1 for plan in plans) else "decode"
