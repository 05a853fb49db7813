"""Where drafts come from, and how many of them the target verifies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from echelon.pb import inference_pb2, scheduler_pb2, worker_pb2
from scheduler.config import Pipeline, SpeculationConfig
from scheduler.drafting.continuous import Continuous
from scheduler.drafting.drafter import Drafter
from scheduler.drafting.lookup import Lookup
from scheduler.drafting.serial import Serial
from scheduler.engines.engine import EngineView
from scheduler.policy.acceptance import Acceptance
from scheduler.policy.policy import Drafts
from scheduler.requests.admission import max_drafts
from scheduler.requests.request import Request, Seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Of what is common to all sources."""

    lookup_s: float = 1e-6  # what a draft from lookup costs the policy; not measured
    recent_share: float = 0.05  # of a verdict in the means that status reports; not measured


_TUNING = Tuning()


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one seq could verify now."""

    drafts: Drafts
    token_ids: Sequence[int]
    is_chain: bool  # they are the draft engine's


class Speculation:
    """The draft sources of a scheduler behind one face, and the policy that rules them."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self.drafter: Drafter = Serial(config) if config.pipeline is Pipeline.SERIAL else Continuous(config)
        self._policy = self.drafter.policy
        self._lookup = Lookup() if config.uses_lookup else None
        if not config.uses_draft_model:
            self._policy.observe_draft(num_seqs=1, num_steps=1, num_chunk_tokens=1, run_s=_TUNING.lookup_s)
        self._num_looked_up = 0
        self._recent_drafts = 0.0  # of a row that had any
        self._recent_accepted = 0.0  # of them

    def welcome(self, request: Request) -> None:
        """A request that will run."""
        for seq in request.seqs:
            seq.acceptance = Acceptance.start(self._policy.prior)
            seq.has_draft_model = self._config.uses_draft_model
            if self._lookup is not None:
                self._lookup.welcome(seq)

    def release(self, seq: Seq) -> None:
        """The seq needs no drafts any more, or not before it runs again."""
        self.drafter.release(seq)
        seq.held_until = None

    def finish(self, seq: Seq) -> None:
        """The seq has ended; what it has produced may help others."""
        if self._lookup is not None:
            self._lookup.finish(seq)

    def adjust(self, seq: Seq, wish: inference_pb2.Speculation) -> None:
        """The request wants to speculate in another way from now on."""
        seq.max_drafts = max_drafts(wish, self._config)
        seq.is_draft_fixed = wish.HasField("num_speculative_tokens")
        if seq.max_drafts == 0:
            self.release(seq)

    def report(self, status: scheduler_pb2.SchedulerStatus, running: Iterable[Seq]) -> None:
        """Fills in what is known here."""
        status.draft_tokens_total = self.drafter.num_drafted
        running = list(running)
        status.wasted_draft_tokens_total = self.drafter.num_wasted(running)
        status.lookup_tokens_total = self._num_looked_up
        status.verdict_cache_hits_total = self.drafter.cache.num_hits
        status.verdict_cache_misses_total = self.drafter.cache.num_misses
        status.acceptance_rate = self._recent_accepted / self._recent_drafts if self._recent_drafts else 0.0
        status.drafts_per_verification = self._recent_drafts
        seats = [(seq.draft.num_ahead, seq.window) for seq in running if seq.draft is not None and seq.window]
        if seats:
            status.window_occupancy = min(1.0, sum(ahead for ahead, _ in seats) / sum(window for _, window in seats))
        engine = self.drafter.engine
        if engine is not None:
            status.num_draft_blocks = engine.blocks.num_blocks
            status.num_free_draft_blocks = engine.blocks.num_free

    # -- the target's side --------------------------------------------------------------------------------------------

    @property
    def target_waits(self) -> bool:
        """Serial: for drafts."""
        return self.drafter.target_waits

    def speculates(self, running: Iterable[Seq]) -> bool:
        """Somebody is to have drafts, if they pay."""
        return any(seq.max_drafts > 0 and (self._looks_up(seq) or seq.draft is not None) for seq in running)

    def expects_drafts(self, running: Iterable[Seq]) -> bool:
        """Somebody may have drafts to verify when the round on its way is back."""
        return any(seq.max_drafts > 0 and (self._looks_up(seq) or self.drafter.may_bring(seq)) for seq in running)

    def choose(
        self, seqs: Sequence[Seq], now: float, *, num_other_tokens: int, num_waiting: int
    ) -> dict[Seq, Sequence[int]]:
        """Drafts for each of these seqs, whose turn it is to decode; those that are left out wait for theirs."""
        offers = [self._offer(seq, now) for seq in seqs]
        if not any(offer.drafts.limit for offer in offers):
            return dict.fromkeys(seqs, ())
        choices = self._policy.choose(
            [offer.drafts for offer in offers], num_other_tokens=num_other_tokens, num_waiting=num_waiting
        )
        chosen: dict[Seq, Sequence[int]] = {}
        for seq, offer, choice in zip(seqs, offers, choices, strict=True):
            if choice.hold_s > 0.0:
                seq.held_until = seq.held_until or now + choice.hold_s
                continue
            chosen[seq] = offer.token_ids[: choice.num_verify]
            seq.verifies_chain = offer.is_chain
        return chosen

    def next_release(self, running: Iterable[Seq]) -> float | None:
        """When the first of the held seqs has waited long enough."""
        return min((seq.held_until for seq in running if seq.held_until is not None), default=None)

    def _offer(self, seq: Seq, now: float) -> _Offer:
        drafts = self.drafter.drafts_of(seq, may_hold=seq.held_until is None or now < seq.held_until)
        chain = [drafted.token_id for drafted in seq.draft.chain] if seq.draft is not None and drafts.num_ready else []
        if self._lookup is None or not self._prefers_lookup(self._lookup, seq):
            return _Offer(drafts, chain, is_chain=True)
        return _Offer(self._lookup.drafts_of(seq, drafts), self._lookup.find(seq).token_ids, is_chain=False)

    def _prefers_lookup(self, lookup: Lookup, seq: Seq) -> bool:
        return bool(lookup.find(seq).token_ids) and lookup.is_better(seq, self.drafter.drafts_of(seq))

    def _looks_up(self, seq: Seq) -> bool:
        return self._lookup is not None and self._lookup.serves(seq)

    def sent(self, seq: Seq, num_drafts: int) -> None:
        """A target row of the seq is on its way, with that many drafts."""
        seq.num_verifying = num_drafts
        seq.held_until = None

    def on_verdict(self, seq: Seq, num_accepted: int, num_verified: int) -> None:
        self._num_looked_up += 0 if seq.verifies_chain else num_verified
        if num_verified:
            share = _TUNING.recent_share if self._recent_drafts else 1.0
            self._recent_drafts += share * (num_verified - self._recent_drafts)
            self._recent_accepted += share * (num_accepted - self._recent_accepted)
        if seq.verifies_chain:
            seq.acceptance.observe(num_accepted, num_verified)
        elif self._lookup is not None:
            self._lookup.on_verdict(seq, num_accepted, num_verified)

    def on_commit(self, seq: Seq, token_ids: Sequence[int]) -> None:
        """The history has grown by these tokens."""
        if self._lookup is not None:
            self._lookup.on_commit(seq, token_ids)
        self.drafter.on_commit(seq, token_ids)

    def observe_target(self, *, num_seqs: int, num_tokens: int, num_context: int, run_s: float) -> None:
        self._policy.observe_target(num_seqs=num_seqs, num_tokens=num_tokens, num_context=num_context, run_s=run_s)

    # -- the draft engine ---------------------------------------------------------------------------------------------

    def attach(self, engine: EngineView) -> None:
        self.drafter.attach(engine)

    def detach(self, seqs: Iterable[Seq]) -> None:
        self.drafter.detach(seqs)

    def plan_draft(self, running: Iterable[Seq], now: float) -> worker_pb2.Round | None:
        running = list(running)
        served: set[Seq] = set()
        if self._lookup is not None:
            served = {seq for seq in running if seq.is_decoding and self._prefers_lookup(self._lookup, seq)}
        return self.drafter.plan(running, now, served=served)

    def on_draft_result(self, result: worker_pb2.RoundResult, now: float, *, target_idle_since: float | None) -> None:
        self.drafter.on_result(result, now, target_idle_since=target_idle_since)
