"""The draft: extends a chain of tokens for each seq, one token per step for the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from echelon.pb.worker_pb2 import EngineInfo, Round, RowResult
from workers.engine.engine import NO_TOKEN, ActiveRow, ModelEngine, ModelRunner, Mover, chosen_token_ids
from workers.engine.overtaken import drop_overtaken
from workers.engine.rounds import plan_draft
from workers.engine.seq_state import SeqTable
from workers.sampling.rows import RowEntry
from workers.sampling.sampler import SampledRows
from workers.upload import upload


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
    chain: _Chain | None  # grows after these tokens


class DraftEngine(ModelEngine):
    """See workers.engine.Engine.

    Drafts are chosen by the target's rule with the target's noise (same seed, same absolute positions), which makes
    equal choices likely. Source: arXiv 2408.07978.

    In a layer-parallel model, a step that drafts leaves approximate KV. Calibration replaces the KV of tokens that were
    accepted. Source: arXiv 2502.02493. So a round begins with a forward of the exact model, for history and calibration
    of all rows. Then each step adds a token to the chains that grow.
    """

    def __init__(self, runner: ModelRunner, table: SeqTable, info: EngineInfo, *, mover: Mover | None = None) -> None:
        super().__init__(runner, table, info, plan_draft, mover)

    def check(self, round_: Round, behind: Sequence[Round] = ()) -> None:
        drop_overtaken(round_, behind, self._table)
        super().check(round_, behind)

    def _run_rows(self, round_: Round, active: list[ActiveRow]) -> int:
        exact, late, chains = self._spans(active)
        num_steps = 0
        for spans in filter(None, (exact, late)):
            hidden, opened = self._compute_exactly(spans)
            chains += self._grow(opened, hidden, round_)
            num_steps += 1
        while chains:
            chains = self._grow(chains, self._step(chains), round_)
            num_steps += 1
        for each in active:
            if len(each.result.token_ids) < each.plan.num_ordered:
                self._table.fell_short[each.plan.slot] = True
        return num_steps

    def _spans(self, active: list[ActiveRow]) -> tuple[list[_Span], list[_Span], list[_Chain]]:
        """The spans to compute exactly, the spans for a second forward because the first leaves a gap before them, and
        the chains that continue where they were."""
        exact: list[_Span] = []
        late: list[_Span] = []
        chains: list[_Chain] = []
        for each in active:
            plan, slot = each.plan, each.plan.slot
            num_exact, num_computed = int(self._table.num_exact[slot]), int(self._table.num_computed[slot])
            chain = _Chain(slot, plan.num_drafts, each.result) if plan.num_drafts else None
            calibrated, end = num_exact + plan.calibrate_len, num_computed + plan.chunk_len
            goes_on = plan.goes_on and self._runner.is_approximate
            if calibrated == num_computed and not goes_on:
                exact.append(_Span(slot, num_exact, end, chain))
                continue
            if plan.calibrate_len:
                exact.append(_Span(slot, num_exact, calibrated, None))
            if chain and goes_on:
                chains.append(chain)
            elif plan.chunk_len:
                (late if plan.calibrate_len else exact).append(_Span(slot, num_computed, end, chain))
        return exact, late, chains

    def _compute_exactly(self, spans: list[_Span]) -> tuple[Tensor, list[_Chain]]:
        """Compute the spans. Returns hidden states [num_chains, hidden_size] at the ends of those whose chains grow,
        and these chains."""
        slots = [span.slot for span in spans]
        counts = [span.end - span.start for span in spans]
        starts = [span.start for span in spans]
        with self._runner.tracer.span(self._step_name(spans)):
            hidden = self._runner.forward(self._table.compute(slots, starts, counts, self._runner.device))
        ends = zip(spans, accumulate(counts), strict=True)
        last_rows = [(end - 1, span.chain) for span, end in ends if span.chain]
        rows = upload([row for row, _ in last_rows], torch.int64, hidden.device)
        return hidden[rows], [chain for _, chain in last_rows]

    def _step_name(self, spans: list[_Span]) -> str:
        """The name of a forward of all these spans in a trace."""
        if any(span.start < self._table.num_computed[span.slot] for span in spans):
            return "calibrate"
        # A chain grows after its last token and, after a verdict, the target's token that follows it.
        return "draft" if all(span.chain and span.end - span.start <= 2 for span in spans) else "prefill"

    def _step(self, chains: list[_Chain]) -> Tensor:
        """Compute the last token of each chain -> hidden states [num_chains, hidden_size]."""
        table, slots = self._table, [chain.slot for chain in chains]
        with self._runner.tracer.span("draft"):
            hidden = self._runner.draft_forward(table.pack(slots, [1] * len(slots), self._runner.device))
        table.num_computed[slots] += 1
        if not self._runner.is_approximate:
            table.num_exact[slots] = table.num_computed[slots]
        return hidden

    def _grow(self, chains: list[_Chain], hidden: Tensor, round_: Round) -> list[_Chain]:
        """Append one token to each chain; hidden [num_chains, hidden_size]. Returns the chains that want another."""
        if not chains:
            return []
        table = self._table
        entries = [RowEntry(table.sampling(chain.slot), int(table.lengths[chain.slot]), ()) for chain in chains]
        sampled = self._runner.choose(
            hidden, entries, num_alternatives=round_.num_alternatives, with_confidence=round_.confidences
        )
        grown = self._fill_in(chains, sampled)
        table.append([chain.slot for chain in grown], [chain.result.token_ids[-1:] for chain in grown])
        return [chain for chain in grown if chain.remaining]

    def _fill_in(self, chains: list[_Chain], sampled: SampledRows) -> list[_Chain]:
        """Add the drafts to the answers. Returns the chains that got one."""
        alternatives = None if sampled.alternatives is None else sampled.alternatives.tolist()
        confidences = None if sampled.confidences is None else sampled.confidences.tolist()
        grown = []
        for row, (chain, token_id) in enumerate(zip(chains, chosen_token_ids(sampled).tolist(), strict=True)):
            if token_id == NO_TOKEN:
                self._end(chain)
                continue
            chain.result.token_ids.append(token_id)
            chain.remaining -= 1
            if alternatives is not None:
                chain.result.alternative_token_ids.extend(alternatives[row])
            if confidences is not None:
                chain.result.confidences.append(confidences[row])
            grown.append(chain)
        return grown

    def _end(self, chain: _Chain) -> None:
        """The chain's logits are not finite. Its earlier drafts stay, as if no more had been ordered."""
        if chain.result.token_ids:
            self._table.forget_last(chain.slot)  # the last draft of an answer has no KV
        else:
            chain.result.non_finite = True
