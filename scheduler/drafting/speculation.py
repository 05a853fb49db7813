"""Where drafts come from, and how many of them the target verifies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter

from echelon.pb import inference_pb2, scheduler_pb2, worker_pb2
from scheduler.config import Pipeline, SpeculationConfig
from scheduler.drafting.continuous import Continuous
from scheduler.drafting.drafter import Drafter
from scheduler.drafting.lookup import Lookup
from scheduler.drafting.row import DraftRow
from scheduler.drafting.serial import Serial
from scheduler.drafting.state import DraftState, SpeculationParams
from scheduler.engines.engine import EngineView, InFlight
from scheduler.policy.acceptance import Acceptance
from scheduler.policy.policy import Drafts
from scheduler.requests.request import Seq
from scheduler.target.row import TargetRow
from scheduler.target.state import TargetState


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Settings that all sources share."""

    lookup_s: float = 1e-6  # assumed cost of a draft from lookup; not measured
    recent_share: float = 0.05  # weight of a verdict in the means that status reports; not measured


_TUNING = Tuning()
_seq_of = attrgetter("seq")


@dataclass(frozen=True, slots=True)
class _Offer:
    """The drafts that one seq could verify now."""

    drafts: Drafts
    token_ids: Sequence[int]
    is_chain: bool  # they come from the draft engine


class Speculation:
    """The only entry to the draft sources of a scheduler and to the policy that rules them."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self._states: dict[Seq, DraftState] = {}  # of all seqs that have not ended
        pipeline = Serial if config.pipeline is Pipeline.SERIAL else Continuous
        self.drafter: Drafter = pipeline(config, self._states)
        self._policy = self.drafter.policy
        self._lookup = Lookup() if config.uses_lookup else None
        if not config.uses_draft_model:
            self._policy.observe_draft(num_seqs=1, num_steps=1, num_chunk_tokens=1, run_s=_TUNING.lookup_s)
        # Seqs whose next target row waits for drafts, and until when at most.
        self._held_until: dict[DraftState, float] = {}
        self._num_looked_up = 0
        self._recent_drafts = 0.0  # mean drafts of a row that had any
        self._recent_accepted = 0.0  # of them

    def add(self, targets: Iterable[TargetState], params: inference_pb2.Speculation) -> None:
        """Add the seqs of a request that will run. `params`: how it wants to speculate."""
        for target in targets:
            self._states[target.seq] = DraftState(
                seq=target.seq,
                target=target,
                params=SpeculationParams.of(params, self._config),
                acceptance=Acceptance.start(self._policy.prior),
                has_draft_model=self._config.uses_draft_model,
            )
            if self._lookup is not None:
                self._lookup.add(target.seq)

    def prefetch(self, seq: Seq, now: float) -> None:
        """The seq's prefix is on its way to the target's device: bring the draft's to its own."""
        self.drafter.prefetch(self._states[seq], now)

    def release(self, seq: Seq) -> None:
        """The seq needs no more drafts, or none before it runs again."""
        state = self._states[seq]
        self.drafter.release(state)
        self._held_until.pop(state, None)

    def finish(self, seq: Seq) -> None:
        """The seq has ended; its output may help others."""
        self.release(seq)
        del self._states[seq]
        if self._lookup is not None:
            self._lookup.finish(seq)

    def adjust(self, seq: Seq, params: inference_pb2.Speculation) -> None:
        """The request changes how it speculates from now on."""
        state = self._states[seq]
        state.params = SpeculationParams.of(params, self._config)
        if state.params.max_drafts == 0:
            self.release(seq)

    def _states_of(self, targets: Iterable[TargetState]) -> Iterator[DraftState]:
        return map(self._states.__getitem__, map(_seq_of, targets))

    def report(self, status: scheduler_pb2.SchedulerStatus) -> None:
        """Fill in the fields that speculation knows."""
        status.draft_tokens_total = self.drafter.num_drafted
        status.wasted_draft_tokens_total = self.drafter.num_wasted
        status.lookup_tokens_total = self._num_looked_up
        status.verdict_cache_hits_total = self.drafter.cache.num_hits
        status.verdict_cache_misses_total = self.drafter.cache.num_misses
        status.acceptance_rate = self._recent_accepted / self._recent_drafts if self._recent_drafts else 0.0
        status.drafts_per_verification = self._recent_drafts
        drafting = [state for state in self._states.values() if state.slot is not None and state.window]
        if drafting:
            num_ahead, num_wanted = sum(state.num_ahead for state in drafting), sum(state.window for state in drafting)
            status.window_occupancy = min(1.0, num_ahead / num_wanted)
        engine = self.drafter.engine
        if engine is not None:
            status.num_draft_blocks = engine.blocks.num_blocks
            status.num_free_draft_blocks = engine.blocks.num_free

    # -- the target's side --------------------------------------------------------------------------------------------

    @property
    def target_waits(self) -> bool:
        """Serial: for drafts."""
        return self.drafter.target_waits

    def speculates(self, running: Iterable[TargetState]) -> bool:
        """Whether some seq should get drafts, if they pay."""
        return any(
            state.params.max_drafts > 0 and (self._lookup is not None or state.slot is not None)
            for state in self._states_of(running)
        )

    def expects_drafts(self, running: Iterable[TargetState]) -> bool:
        """Whether some seq may have drafts to verify when the current round comes back."""
        return any(
            state.params.max_drafts > 0 and (self._lookup is not None or self.drafter.may_bring(state))
            for state in self._states_of(running)
        )

    def choose(
        self, targets: Sequence[TargetState], now: float, *, num_other_tokens: int, num_waiting: int
    ) -> dict[TargetState, Sequence[int]]:
        """Drafts for each of these seqs, whose turn it is to decode. Seqs that are left out wait for theirs."""
        states = list(self._states_of(targets))
        if not any(state.limit for state in states):
            for state in states:
                self._held_until.pop(state, None)
            return dict.fromkeys(targets, ())
        offers = [self._offer(state, now) for state in states]
        choices = self._policy.choose(
            [offer.drafts for offer in offers], num_other_tokens=num_other_tokens, num_waiting=num_waiting
        )
        chosen: dict[TargetState, Sequence[int]] = {}
        for state, offer, choice in zip(states, offers, choices, strict=True):
            if choice.hold_s > 0.0:
                self._held_until.setdefault(state, now + choice.hold_s)
                continue
            self._held_until.pop(state, None)
            chosen[state.target] = offer.token_ids[: choice.num_verify]
            state.verifies_chain = offer.is_chain
        return chosen

    def holds(self, target: TargetState) -> bool:
        """Whether the seq's next target row waits for drafts, as `choose` decided."""
        return self._states[target.seq] in self._held_until

    def let_go(self, targets: Iterable[TargetState]) -> None:
        """These seqs wait for no drafts now."""
        for state in self._states_of(targets):
            self._held_until.pop(state, None)

    @property
    def next_release(self) -> float | None:
        """When the first of the held seqs has waited long enough."""
        return min(self._held_until.values(), default=None)

    def stops_waiting_at(self, target_idle_since: float) -> float:
        """When an idle target continues without drafts that have not come; inf if it does not wait."""
        late_at = self.drafter.late_at(target_idle_since) if self.target_waits else inf
        return min(late_at, inf if self.next_release is None else self.next_release)

    def _offer(self, state: DraftState, now: float) -> _Offer:
        seq, slot = state.seq, state.slot
        drafts = self.drafter.drafts_of(state, may_hold=now < self._held_until.get(state, inf))
        chain = [drafted.token_id for drafted in slot.chain] if slot is not None and drafts.num_ready else []
        if self._lookup is None or not self._prefers_lookup(self._lookup, state):
            return _Offer(drafts, chain, is_chain=True)
        found = self._lookup.find(seq, state.limit).token_ids
        return _Offer(self._lookup.drafts_of(seq, drafts), found, is_chain=False)

    def _prefers_lookup(self, lookup: Lookup, state: DraftState) -> bool:
        found = lookup.find(state.seq, state.limit)
        return bool(found.token_ids) and lookup.is_better(state.seq, self.drafter.drafts_of(state))

    def on_verdict(self, seq: Seq, num_accepted: int, num_verified: int) -> None:
        state = self._states[seq]
        self._num_looked_up += 0 if state.verifies_chain else num_verified
        if num_verified:
            share = _TUNING.recent_share if self._recent_drafts else 1.0
            self._recent_drafts += share * (num_verified - self._recent_drafts)
            self._recent_accepted += share * (num_accepted - self._recent_accepted)
        if state.verifies_chain:
            state.acceptance.observe(num_accepted, num_verified)
        elif self._lookup is not None:
            self._lookup.on_verdict(seq, num_accepted, num_verified)

    def on_commit(self, seq: Seq, token_ids: Sequence[int]) -> None:
        """These tokens joined the history."""
        if self._lookup is not None:
            self._lookup.on_commit(seq, token_ids)
        self.drafter.on_commit(self._states[seq], token_ids)

    def observe_target(self, record: InFlight[TargetRow]) -> None:
        """A round of the target has come back. A round with prompts says nothing about decoding."""
        if not (record.is_prefill or record.was_late):
            self._policy.observe_target(
                num_seqs=len(record.rows),
                num_tokens=record.num_tokens,
                num_context=sum(row.start for row in record.rows),
                run_s=record.wall_s,
            )

    # -- the draft engine ---------------------------------------------------------------------------------------------

    def attach(self, engine: EngineView[DraftRow], *, shares_process: bool) -> None:
        self.drafter.attach(engine, shares_process=shares_process)

    def detach(self) -> None:
        self.drafter.detach()

    def plan_draft(
        self, running: Iterable[TargetState], now: float, *, target_idle_since: float | None
    ) -> worker_pb2.Round | None:
        self.drafter.is_left_behind = now >= self.drafter.late_at(target_idle_since)
        states = list(self._states_of(running))
        served: set[DraftState] = set()
        if self._lookup is not None:
            served = {
                state for state in states if state.target.is_decoding and self._prefers_lookup(self._lookup, state)
            }
        return self.drafter.plan(states, now, served=served)

    def on_draft_result(self, result: worker_pb2.RoundResult, now: float, *, target_idle_since: float | None) -> None:
        self.drafter.on_result(result, now, target_idle_since=target_idle_since)
