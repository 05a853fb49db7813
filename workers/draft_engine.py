"""The draft: extends a chain of tokens for each seq, a whole batch a step."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from echelon.pb.worker_pb2 import EngineInfo, RowResult
from workers.engine import NO_TOKEN, ActiveRow, ModelEngine, ModelRunner, chosen_token_ids
from workers.rounds import plan_draft
from workers.sampler import RowEntry
from workers.seq_state import SeqTable


@dataclass(slots=True)
class _Chain:
    """A chain that grows in this round."""

    slot: int
    remaining: int
    result: RowResult


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens of a seq that go through the model together."""

    slot: int
    start: int
    end: int
    chain: _Chain | None  # grows behind them


class DraftEngine(ModelEngine):
    """See workers.engine.Engine.

    Drafts are chosen by the target's rule with the target's noise (same seed, same absolute positions), which makes
    equal choices likely. Source: arXiv 2408.07978.

    Where the model is layer-parallel a step that drafts leaves approximate KV; calibration replaces that of tokens that
    were accepted. Source: arXiv 2502.02493. So a round is a forward of the exact model, for history and calibration of
    all rows, and then a step a token for the chains that grow.
    """

    def __init__(self, runner: ModelRunner, table: SeqTable, info: EngineInfo) -> None:
        super().__init__(runner, table, info, plan_draft)

    def _run_rows(self, active: list[ActiveRow]) -> int:
        exact, late, chains = self._spans(active)
        num_steps = 0
        for spans in filter(None, (exact, late)):
            chains += self._compute_exactly(spans)
            num_steps += 1
        while chains:
            chains = self._step(chains)
            num_steps += 1
        for each in active:
            if len(each.result.token_ids) < each.plan.num_ordered:
                self._table.fell_short[each.plan.slot] = True
        return num_steps

    def _spans(self, active: list[ActiveRow]) -> tuple[list[_Span], list[_Span], list[_Chain]]:
        """What is computed exactly, what is in a second forward because the first one leaves a gap before it, and the
        chains that go on where they were."""
        exact: list[_Span] = []
        late: list[_Span] = []
        chains: list[_Chain] = []
        for each in active:
            plan, slot = each.plan, each.plan.slot
            num_exact, num_computed = int(self._table.num_exact[slot]), int(self._table.num_computed[slot])
            chain = _Chain(slot, plan.num_drafts, each.result) if plan.num_drafts else None
            calibrated = num_exact + plan.calibrate_len
            if calibrated == num_computed:
                exact.append(_Span(slot, num_exact, num_computed + plan.chunk_len, chain))
                continue
            if plan.calibrate_len:
                exact.append(_Span(slot, num_exact, calibrated, None))
            if chain and plan.goes_on:
                chains.append(chain)
            elif plan.chunk_len:
                spans = late if plan.calibrate_len else exact
                spans.append(_Span(slot, num_computed, num_computed + plan.chunk_len, chain))
        return exact, late, chains

    def _compute_exactly(self, spans: list[_Span]) -> list[_Chain]:
        """Returns the chains that want a second draft."""
        slots = [span.slot for span in spans]
        counts = [span.end - span.start for span in spans]
        starts = [span.start for span in spans]
        hidden = self._runner.forward(self._table.compute(slots, starts, counts, self._runner.device))
        last_rows = [(end - 1, span.chain) for span, end in zip(spans, accumulate(counts), strict=True) if span.chain]
        if not last_rows:
            return []
        rows = torch.tensor([row for row, _ in last_rows], device=hidden.device)
        return self._grow([chain for _, chain in last_rows], hidden[rows])

    def _step(self, chains: list[_Chain]) -> list[_Chain]:
        """Compute the last token of each chain and append one; returns the chains that want another."""
        table, slots = self._table, [chain.slot for chain in chains]
        hidden = self._runner.draft_forward(table.pack(slots, [1] * len(slots), self._runner.device))
        table.num_computed[slots] += 1
        if not self._runner.is_approximate:
            table.num_exact[slots] = table.num_computed[slots]
        return self._grow(chains, hidden)

    def _grow(self, chains: list[_Chain], hidden: Tensor) -> list[_Chain]:
        """Append one token to each chain, hidden [num_chains, hidden_size]; returns those that want another."""
        table = self._table
        entries = [RowEntry(table.sampling(chain.slot), int(table.lengths[chain.slot]), ()) for chain in chains]
        token_ids = chosen_token_ids(self._runner.choose(hidden, entries)).tolist()
        grown = []
        for chain, token_id in zip(chains, token_ids, strict=True):
            if token_id == NO_TOKEN:
                self._end(chain)
                continue
            chain.result.token_ids.append(token_id)
            chain.remaining -= 1
            grown.append((chain, token_id))
        table.append([chain.slot for chain, _ in grown], [(token_id,) for _, token_id in grown])
        return [chain for chain, _ in grown if chain.remaining]

    def _end(self, chain: _Chain) -> None:
        """Its logits are not finite. What it has got stays, as if no more had been ordered."""
        if chain.result.token_ids:
            self._table.forget_last(chain.slot)  # of the drafts in an answer the last one has no KV
        else:
            chain.result.non_finite = True
