"""The target: prefill chunks, plain decoding and verification of drafts in one packed forward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from echelon.pb.sampling_pb2 import PositionLogprobs
from echelon.pb.worker_pb2 import EngineInfo, Round, RoundResult, RowResult
from kernels.verify_chain import verify_chain
from workers.engine import NO_TOKEN, ModelRunner, apply_changes, chosen_token_ids
from workers.rounds import RowPlan, plan_target
from workers.sampler import RowEntry
from workers.seq_state import SeqTable

NO_DRAFT = -1
PROMPT_ROWS = 256  # prompt positions whose logits are held at a time


@dataclass(frozen=True, slots=True)
class _Verify:
    """A seq for which a token is chosen in this round."""

    plan: RowPlan
    result: RowResult
    draft_token_ids: Sequence[int]
    first_row: int  # in the packed batch: the last token of the history; the drafts follow it
    length: int  # of the history


class TargetEngine:
    """See workers.engine.Engine."""

    def __init__(self, runner: ModelRunner, table: SeqTable, info: EngineInfo) -> None:
        self._runner = runner
        self._table = table
        self._info = info

    @property
    def info(self) -> EngineInfo:
        return self._info

    def check(self, round_: Round) -> None:
        plan_target(round_, self._table)

    def reset(self) -> None:
        self._table.free_all()

    def run(self, round_: Round) -> RoundResult:
        plans = plan_target(round_, self._table)
        apply_changes(round_, self._table)
        results = [RowResult(slot=plan.slot) for plan in plans]
        active = [index for index, plan in enumerate(plans) if plan.chunk_len]
        if not active:
            return RoundResult(rows=results)
        for index in active:
            drafts = round_.rows[index].draft_token_ids[: plans[index].num_drafts]
            self._table.put_behind(plans[index].slot, drafts)
        num_steps = self._step([(plans[index], results[index]) for index in active])
        return RoundResult(rows=results, num_steps=num_steps)

    def _step(self, active: list[tuple[RowPlan, RowResult]]) -> int:
        """All rows in one forward, and in a second one those that their drafts have spoiled. Returns how many."""
        table = self._table
        counts = [plan.chunk_len + plan.num_drafts for plan, _ in active]
        hidden = self._runner.forward(table.pack([plan.slot for plan, _ in active], counts, self._runner.device))
        verifies = []
        for (plan, result), end in zip(active, accumulate(counts), strict=True):
            first_row = end - plan.num_drafts - 1
            self._prompt_logprobs(plan, hidden[first_row + 1 - plan.chunk_len : first_row + 1], result)
            table.num_computed[plan.slot] += plan.chunk_len
            if plan.at_end:
                length = int(table.lengths[plan.slot])
                drafts = table.token_ids[plan.slot, length : length + plan.num_drafts].tolist()
                verifies.append(_Verify(plan, result, drafts, first_row, length))
        spoiled = self._verify(hidden, verifies) if verifies else []
        return 1 + (self._step([self._undo(seq) for seq in spoiled]) if spoiled else 0)

    def _undo(self, seq: _Verify) -> tuple[RowPlan, RowResult]:
        """The row as it was, without its drafts. What follows a token is hidden from it by a factor of 0, which does
        not hide NaN; and a stream must not depend on its drafts."""
        self._table.num_computed[seq.plan.slot] -= seq.plan.chunk_len
        seq.result.Clear()
        seq.result.slot = seq.plan.slot
        return replace(seq.plan, num_drafts=0), seq.result

    def _verify(self, hidden: Tensor, verifies: list[_Verify]) -> list[_Verify]:
        """Choose a token at each position behind a history and its drafts; commit as far as they agree. Returns the
        seqs with drafts whose logits were not finite; for them nothing was committed."""
        rows: list[int] = []
        entries: list[RowEntry] = []
        draft_token_ids: list[int] = []
        for seq in verifies:
            sampling, num_drafts = self._table.sampling(seq.plan.slot), len(seq.draft_token_ids)
            rows.extend(range(seq.first_row, seq.first_row + num_drafts + 1))
            for depth in range(num_drafts + 1):
                entries.append(RowEntry(sampling, seq.length + depth, seq.draft_token_ids[:depth]))
            draft_token_ids.extend(seq.draft_token_ids)
            draft_token_ids.append(NO_DRAFT)
        device = self._runner.device
        cu_rows = [0, *accumulate(len(seq.draft_token_ids) + 1 for seq in verifies)]
        sampled = self._runner.choose(hidden[torch.tensor(rows, device=device)], entries)
        num_accepted, next_token_ids = verify_chain(
            chosen_token_ids(sampled),
            torch.tensor(draft_token_ids, device=device),
            torch.tensor(cu_rows, device=device),
        )
        verdicts = torch.stack((num_accepted, next_token_ids), dim=1).tolist()
        spoiled = []
        for seq, row, (accepted, next_token_id) in zip(verifies, cu_rows[:-1], verdicts, strict=True):
            if next_token_id == NO_TOKEN and seq.draft_token_ids:
                spoiled.append(seq)
                continue
            self._commit(seq, accepted, next_token_id)
            if sampled.logprobs is not None:
                self._add_logprobs(seq, sampled.logprobs[row : row + len(seq.result.token_ids)])
        return spoiled

    def _commit(self, seq: _Verify, num_accepted: int, next_token_id: int) -> None:
        """Committed tokens join the history; KV of the last one is missing, as for any history."""
        result = seq.result
        if next_token_id == NO_TOKEN:
            result.non_finite = True
            self._table.num_computed[seq.plan.slot] = seq.length - 1
            return
        result.num_verified_tokens = len(seq.draft_token_ids)
        result.num_accepted_tokens = num_accepted
        result.token_ids.extend(seq.draft_token_ids[:num_accepted])
        result.token_ids.append(next_token_id)
        self._table.append(seq.plan.slot, result.token_ids)
        self._table.num_computed[seq.plan.slot] = seq.length + num_accepted

    def _add_logprobs(self, seq: _Verify, logprobs: Sequence[PositionLogprobs | None]) -> None:
        seq.result.logprobs.extend(entry for entry in logprobs if entry is not None)

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
        for row in range(0, end - start, PROMPT_ROWS):
            rows = slice(row, min(row + PROMPT_ROWS, end - start))
            result.prompt_logprobs.extend(self._runner.prompt_logprobs(hidden[rows], next_token_ids[rows], num_top))
