"""The draft: extends a chain of tokens for each seq, one token per step for the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from echelon.pb.worker_pb2 import EngineInfo, Round, RowResult
from kernels.sampling.verify_chain import verify_chain
from workers.engine.engine import NO_TOKEN, ActiveRow, ModelEngine, ModelRunner, Mover, chosen_token_ids
from workers.engine.lower_draft import NOTHING, LowerDraft, Proposal, Wanted
from workers.engine.overtaken import drop_overtaken
from workers.engine.rounds import plan_draft
from workers.engine.seq_state import SeqTable
from workers.sampling.rows import RowEntry
from workers.sampling.sampler import SampledRows
from workers.upload import upload

_NO_PROPOSAL = -1
_MOST_ROWS = 16  # of a step with proposals: more take longer than few with weights in few bits on a CPU


@dataclass(slots=True)
class _Chain:
    """A chain that grows in this round."""

    slot: int
    remaining: int
    result: RowResult
    has_lower: bool  # the request allows a level beneath the draft
    proposal: Proposal = field(default=NOTHING)  # what the next forward verifies

    @property
    def num_rows(self) -> int:
        """Of hidden states at its end, after which tokens are chosen."""
        return 1 + len(self.proposal.token_ids)


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens of a seq that go through the model together."""

    slot: int
    start: int
    end: int
    chain: _Chain | None  # grows after these tokens


class _Chosen(NamedTuple):
    """Choices of rows as Python's numbers."""

    token_ids: list[int]  # NO_TOKEN where logits were not finite
    alternatives: list[list[int]] | None
    confidences: list[float] | None

    @classmethod
    def of(cls, sampled: SampledRows) -> Self:
        return cls(
            chosen_token_ids(sampled).tolist(),
            None if sampled.alternatives is None else sampled.alternatives.tolist(),
            None if sampled.confidences is None else sampled.confidences.tolist(),
        )

    def write(self, row: int, result: RowResult) -> None:
        result.token_ids.append(self.token_ids[row])
        if self.alternatives is not None:
            result.alternative_token_ids.extend(self.alternatives[row])
        if self.confidences is not None:
            result.confidences.append(self.confidences[row])


class DraftEngine(ModelEngine):
    """See workers.engine.Engine.

    Drafts are chosen by the target's rule with the target's noise (same seed, same absolute positions), which makes
    equal choices likely. Source: arXiv 2408.07978.

    In a layer-parallel model, a step that drafts leaves approximate KV. Calibration replaces the KV of tokens that were
    accepted. Source: arXiv 2502.02493. So a round begins with a forward of the exact model, for history and calibration
    of all rows. Then each step adds a token to the chains that grow.

    With a `lower` level, the draft has a draft of its own. A step then computes the last token of a chain and what that
    level proposes after it. The draft chooses a token at each of these positions by the same rule, and keeps proposals
    as far as they equal its choices. So the chain is the draft's own, whatever was proposed. Source: arXiv 2503.13565.
    """

    def __init__(
        self,
        runner: ModelRunner,
        table: SeqTable,
        info: EngineInfo,
        *,
        mover: Mover | None = None,
        lower: LowerDraft | None = None,
    ) -> None:
        super().__init__(runner, table, info, plan_draft, mover)
        self.lower = lower

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        drop_overtaken(round_, queued, self._table)
        super().check(round_, queued)

    def _run_rows(self, round_: Round, active: list[ActiveRow]) -> int:
        exact, late, chains = self._spans(active)
        num_steps = 0
        for spans in filter(None, (exact, late)):
            hidden, opened = self._compute_exactly(spans)
            opened, num_more = self._grow(opened, hidden, round_)
            chains += opened
            num_steps += 1 + num_more
        while chains:
            chains, num_more = self._grow(chains, self._step(chains), round_)
            num_steps += 1 + num_more
        for each in active:
            if len(each.result.token_ids) < each.plan.num_ordered:
                self._table.fell_short[each.plan.slot] = True
        if self.lower is not None:
            followed = (each for each in active if not each.plan.num_drafts and not each.row.without_lower)
            self.lower.follow(self._table, [each.plan.slot for each in followed])
        return max(num_steps, *(len(each.result.token_ids) for each in active))

    def _spans(self, active: list[ActiveRow]) -> tuple[list[_Span], list[_Span], list[_Chain]]:
        """The spans to compute exactly, the spans for a second forward because the first leaves a gap before them, and
        the chains that continue where they were."""
        exact: list[_Span] = []
        late: list[_Span] = []
        chains: list[_Chain] = []
        for each in active:
            plan, slot = each.plan, each.plan.slot
            num_exact, num_computed = int(self._table.num_exact[slot]), int(self._table.num_computed[slot])
            chain = None
            if plan.num_drafts:
                chain = _Chain(slot, plan.num_drafts, each.result, has_lower=not each.row.without_lower)
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
        """Compute the spans. Returns hidden states [num_rows, hidden_size] at the ends of those whose chains grow, and
        these chains, each with its `num_rows`."""
        slots = [span.slot for span in spans]
        self._propose([span.chain for span in spans if span.chain])
        counts = [span.end - span.start + (span.chain.num_rows - 1 if span.chain else 0) for span in spans]
        starts = [span.start for span in spans]
        with self._runner.tracer.span(self._step_name(spans)):
            hidden = self._runner.forward(self._table.compute(slots, starts, counts))
        ends = zip(spans, accumulate(counts), strict=True)
        grown = [(end, span.chain) for span, end in ends if span.chain]
        last_rows = [row for end, chain in grown for row in range(end - chain.num_rows, end)]
        return hidden[upload(last_rows, torch.int64, hidden.device)], [chain for _, chain in grown]

    def _step_name(self, spans: list[_Span]) -> str:
        """The name of a forward of all these spans in a trace."""
        if any(span.start < self._table.num_computed[span.slot] for span in spans):
            return "calibrate"
        # A chain grows after its last token and, after a verdict, the target's token that follows it.
        return "draft" if all(span.chain and span.end - span.start <= 2 for span in spans) else "prefill"

    def _step(self, chains: list[_Chain]) -> Tensor:
        """Compute the last token of each chain, and what is proposed after it -> hidden states [num_rows,
        hidden_size], the `num_rows` of each chain."""
        table, slots = self._table, [chain.slot for chain in chains]
        self._propose(chains)
        with self._runner.tracer.span("draft"):
            batch = table.pack(slots, [chain.num_rows for chain in chains])
            hidden = self._runner.draft_forward(batch)
        self._count_computed(slots)
        return hidden

    def _propose(self, chains: list[_Chain]) -> None:
        """Write what the lower level proposes after the end of each chain. The more chains, the less for each."""
        if self.lower is None or not chains:
            return
        most = _MOST_ROWS // len(chains) - 1
        wanted = [Wanted(each.slot, min(most, each.remaining - 1) if each.has_lower else 0) for each in chains]
        for chain, found in zip(chains, self.lower.propose_all(self._table, wanted), strict=True):
            grammar = self._table.sampling(chain.slot).grammar
            if grammar is not None and found.token_ids:
                found = replace(found, token_ids=found.token_ids[: grammar.num_legal(found.token_ids)])
            chain.proposal = found
            self._table.put_drafts(chain.slot, found.token_ids)

    def _count_computed(self, slots: list[int], counts: int | list[int] = 1) -> None:
        """Draft steps have computed so many more tokens of each slot."""
        table = self._table
        table.num_computed[slots] += counts
        if not self._runner.is_approximate:
            table.num_exact[slots] = table.num_computed[slots]

    def _grow(self, chains: list[_Chain], hidden: Tensor, round_: Round) -> tuple[list[_Chain], int]:
        """Append tokens to each chain: one and what is kept of its proposal, or, if nothing is proposed, as many as all
        of them want if that is one call. `hidden` [num_rows, hidden_size] are the states at their ends. Returns the
        chains that want more, and the number of forwards that this took."""
        if not chains:
            return [], 0
        if self.lower is not None and any(chain.proposal.token_ids for chain in chains):
            return self._verify(self.lower, chains, hidden, round_), 0
        table, slots = self._table, [chain.slot for chain in chains]
        num_wanted = min(chain.remaining for chain in chains)
        steps = self._runner.draft(
            hidden,
            [RowEntry(table.sampling(slot), int(table.lengths[slot]), ()) for slot in slots],
            table.blocks(slots, int(table.lengths[slots].max()) + num_wanted - 1),
            num_steps=num_wanted,
            num_alternatives=round_.num_alternatives,
            with_confidence=round_.confidences,
        )
        for index, sampled in enumerate(steps):
            if index:
                self._count_computed(slots)
            chains = self._fill_in(chains, sampled)
            table.append([chain.slot for chain in chains], [chain.result.token_ids[-1:] for chain in chains])
        return [chain for chain in chains if chain.remaining], len(steps) - 1

    def _verify(self, lower: LowerDraft, chains: list[_Chain], hidden: Tensor, round_: Round) -> list[_Chain]:
        """Choose a token after each chain and after each token proposed for it; keep proposals as far as they equal
        the choices. Returns the chains that want more."""
        table = self._table
        sampled = self._runner.choose(
            hidden,
            [
                RowEntry(table.sampling(chain.slot), int(table.lengths[chain.slot]) + depth, proposed[:depth])
                for chain, proposed in ((chain, chain.proposal.token_ids) for chain in chains)
                for depth in range(chain.num_rows)
            ],
            num_alternatives=round_.num_alternatives,
            with_confidence=round_.confidences,
        )
        cu_rows = [0, *accumulate(chain.num_rows for chain in chains)]
        proposed = [token_id for chain in chains for token_id in (*chain.proposal.token_ids, _NO_PROPOSAL)]
        device = hidden.device
        num_kept, _ = verify_chain(
            chosen_token_ids(sampled),
            upload(proposed, torch.int64, device),
            upload(cu_rows, torch.int64, device),
        )
        chosen = _Chosen.of(sampled)
        going_on = []
        for chain, row, kept in zip(chains, cu_rows, num_kept.tolist(), strict=False):
            lower.observe(chain.proposal, kept)
            if self._take(chain, chosen, range(row, row + kept + 1)):
                going_on.append(chain)
        return going_on

    def _take(self, chain: _Chain, chosen: "_Chosen", rows: range) -> bool:
        """Append the choices of these rows to the chain. All but the last of them have been computed. Whether it wants
        more."""
        taken = [row for row in rows if chosen.token_ids[row] != NO_TOKEN]
        for row in taken:
            chosen.write(row, chain.result)
        self._table.append([chain.slot], [[chosen.token_ids[row] for row in taken]])
        self._count_computed([chain.slot], len(rows) - 1)
        chain.remaining -= len(taken)
        if len(taken) < len(rows):
            self._end(chain)
            return False
        return chain.remaining > 0

    def _fill_in(self, chains: list[_Chain], sampled: SampledRows) -> list[_Chain]:
        """Add the drafts to the answers. Returns the chains that got one."""
        chosen = _Chosen.of(sampled)
        grown = []
        for row, (chain, token_id) in enumerate(zip(chains, chosen.token_ids, strict=True)):
            if token_id == NO_TOKEN:
                self._end(chain)
                continue
            chosen.write(row, chain.result)
            chain.remaining -= 1
            grown.append(chain)
        return grown

    def _end(self, chain: _Chain) -> None:
        """The chain's logits are not finite. Its earlier drafts stay, as if no more had been ordered."""
        if chain.result.token_ids:
            self._table.forget_last(chain.slot)  # the last draft of an answer has no KV
        else:
            chain.result.non_finite = True
