"""The draft: extends a chain of tokens for each seq, a whole batch a step."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from echelon.pb.worker_pb2 import EngineInfo, RowResult
from workers.engine import NO_TOKEN, ActiveRow, ModelEngine, ModelRunner, chosen_token_ids
from workers.rounds import RowPlan, plan_draft
from workers.sampler import RowEntry
from workers.seq_state import SeqTable


@dataclass(slots=True)
class _Chain:
    """A chain that still grows in this round."""

    slot: int
    remaining: int
    result: RowResult


class DraftEngine(ModelEngine):
    """See workers.engine.Engine.

    Drafts are chosen by the target's rule with the target's noise (same seed, same absolute positions), which makes
    equal choices likely. Source: arXiv 2408.07978.
    """

    def __init__(self, runner: ModelRunner, table: SeqTable, info: EngineInfo) -> None:
        super().__init__(runner, table, info, plan_draft)

    def _run_rows(self, active: list[ActiveRow]) -> int:
        return self._draft([(each.plan, each.result) for each in active])

    def _draft(self, active: list[tuple[RowPlan, RowResult]]) -> int:
        """All forwards of a round: the chunks, then a token a step for the chains that still grow."""
        counts = [plan.chunk_len for plan, _ in active]
        hidden = self._forward([plan.slot for plan, _ in active], counts)
        last_rows = [end - 1 for (plan, _), end in zip(active, accumulate(counts), strict=True) if plan.num_drafts]
        chains = [_Chain(plan.slot, plan.num_drafts, result) for plan, result in active if plan.num_drafts]
        num_steps = 1
        if chains:
            hidden = hidden[torch.tensor(last_rows, device=hidden.device)]
        while chains := self._grow(chains, hidden):
            hidden = self._forward([chain.slot for chain in chains], [1] * len(chains))
            num_steps += 1
        return num_steps

    def _forward(self, slots: list[int], counts: list[int]) -> torch.Tensor:
        hidden = self._runner.forward(self._table.pack(slots, counts, self._runner.device))
        self._table.num_computed[slots] += counts
        return hidden

    def _grow(self, chains: list[_Chain], hidden: torch.Tensor) -> list[_Chain]:
        """Append one token to each chain, hidden [num_chains, hidden_size]; returns those that want another."""
        if not chains:
            return []
        table = self._table
        entries = [RowEntry(table.sampling(chain.slot), int(table.lengths[chain.slot]), ()) for chain in chains]
        token_ids = chosen_token_ids(self._runner.choose(hidden, entries)).tolist()
        grown = []
        for chain, token_id in zip(chains, token_ids, strict=True):
            if token_id == NO_TOKEN:
                table.num_computed[chain.slot] = table.lengths[chain.slot] - 1
                chain.result.non_finite = not chain.result.token_ids
                continue
            chain.result.token_ids.append(token_id)
            chain.remaining -= 1
            grown.append((chain, token_id))
        table.append([chain.slot for chain, _ in grown], [(token_id,) for _, token_id in grown])
        return [chain for chain, _ in grown if chain.remaining]
