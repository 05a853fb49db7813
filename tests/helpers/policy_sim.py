"""A target and a draft engine with known step times and acceptance, to see what a policy achieves with them.

Time is simulated and randomness is seeded, so a run is deterministic. A brute-force search over `Fixed` policies shows
what could have been reached.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from scheduler.policy.acceptance import Acceptance, AcceptancePrior, expected_tokens
from scheduler.policy.policy import Choice, Drafts, SpeculationPolicy

TOKENS_OF_A_REQUEST = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Step times in seconds, and how often drafts are right."""

    verify_s: Callable[[int], float]  # by the tokens of a target round
    step_s: Callable[[int], float]  # by the tokens of a draft forward
    acceptance: Callable[[int, float], float]  # by the number of the seq and the share of the run that is over
    slowdown: float = 1.0  # of a target round while the draft runs
    noise: float = 0.03  # of measured times, relative
    num_seqs: Callable[[float], int] = lambda _: 1  # by the share of the run that is over


class Policy(Protocol):
    def choose(self, seqs: Sequence[Drafts], *, num_other_tokens: int, num_waiting: int) -> list[Choice]: ...

    def draft_lengths(self, seqs: Sequence[Drafts]) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Always chooses the same: verifies `num_drafts`, runs a `window` ahead, holds until `num_held` drafts are
    there."""

    num_drafts: int
    window: int = 0
    num_held: int = 0

    def choose(self, seqs: Sequence[Drafts], *, num_other_tokens: int, num_waiting: int) -> list[Choice]:
        if any(s.num_ready < min(self.num_held, s.limit) and s.num_coming and s.may_hold for s in seqs):
            return [Choice(0, 1e9)] * len(seqs)
        return [Choice(min(s.num_ready, self.num_drafts)) for s in seqs]

    def draft_lengths(self, seqs: Sequence[Drafts]) -> list[int]:
        return [self.window or self.num_drafts] * len(seqs)


@dataclass(slots=True, eq=False)
class _Seq:
    number: int
    acceptance: Acceptance
    num_tokens: int = 0
    chain: list[bool] = field(default_factory=list)  # for each draft at hand, whether the target would agree
    verifying: list[bool] = field(default_factory=list)
    window: int = 0
    num_behind: int = 0
    epoch: int = 0

    def drafts(self, limit: int, num_coming: int, may_hold: bool) -> Drafts:
        return Drafts(
            acceptance=self.acceptance.rate,
            num_ready=len(self.chain),
            num_coming=num_coming,
            limit=limit,
            num_behind=self.num_behind,
            may_hold=may_hold,
        )


@dataclass(slots=True)
class Outcome:
    num_tokens: float = 0.0  # expected tokens by acceptance, without the luck of single drafts
    run_s: float = 0.0
    verified: list[int] = field(default_factory=list)  # drafts of each target round
    rate_of: list[tuple[float, float]] = field(default_factory=list)  # time and tokens at the end of each target round

    @property
    def rate(self) -> float:
        return self.num_tokens / self.run_s

    def rate_between(self, start: float, end: float) -> float:
        """Tokens per second in a part of the run, between these shares of its tokens."""
        first, last = (self.rate_of[int(share * (len(self.rate_of) - 1))] for share in (start, end))
        return (last[1] - first[1]) / (last[0] - first[0])


class Simulation:
    """One run of `num_tokens` committed tokens."""

    def __init__(self, world: World, policy: Policy, *, num_tokens: int, limit: int = 8, seed: int = 0) -> None:
        self._world = world
        self._policy = policy
        self._learner = policy if isinstance(policy, SpeculationPolicy) else None
        self._prior = self._learner.prior if self._learner else AcceptancePrior()
        self._random = Random(seed)
        self._num_tokens = num_tokens
        self._limit = limit
        self._seqs: list[_Seq] = []
        self._num_started = 0
        self._outcome = Outcome()

    def serial(self) -> Outcome:
        while self._outcome.num_tokens < self._num_tokens:
            self._start_requests()
            drafts = [seq.drafts(self._limit, 0, False) for seq in self._seqs]
            lengths = self._policy.draft_lengths(drafts)
            for seq, length in zip(self._seqs, lengths, strict=True):
                seq.window = length
            self._draft_serially(lengths)
            drafts = [seq.drafts(self._limit, 0, False) for seq in self._seqs]
            choices = self._policy.choose(drafts, num_other_tokens=0, num_waiting=0)
            self._take(self._seqs, choices)
            self._advance(self._target_round(self._seqs, is_drafting=False))
            for seq in self._seqs:
                self._verdict(seq)
                seq.chain.clear()
            self._note()
        return self._outcome

    def continuous(self) -> Outcome:
        """While the target verifies, the draft continues: one step for every seq whose chain is shorter than its
        window."""
        verdict_at = step_at = hold_until = float("inf")
        in_round: list[_Seq] = []
        in_step: list[tuple[_Seq, int]] = []
        may_hold = True
        while self._outcome.num_tokens < self._num_tokens:
            self._start_requests()
            if step_at == float("inf"):
                in_step = self._next_step()
                if in_step:
                    step_at = self._outcome.run_s + self._step_s(in_step)
            if verdict_at == float("inf"):
                drafts = [seq.drafts(self._limit, self._num_coming(seq), may_hold) for seq in self._seqs]
                choices = self._policy.choose(drafts, num_other_tokens=0, num_waiting=0)
                in_round = [seq for seq, choice in zip(self._seqs, choices, strict=True) if choice.hold_s == 0]
                if in_round:
                    self._take(in_round, [choice for choice in choices if choice.hold_s == 0])
                    verdict_at = self._outcome.run_s + self._target_round(in_round, is_drafting=bool(in_step))
                    may_hold, hold_until = True, float("inf")
                elif hold_until == float("inf"):
                    hold_until = self._outcome.run_s + max(choice.hold_s for choice in choices)
            self._outcome.run_s = min(verdict_at, step_at, hold_until)
            if self._outcome.run_s == hold_until:
                may_hold = False
            if self._outcome.run_s == step_at:
                self._end_step(in_step)
                in_step, step_at = [], float("inf")
            if self._outcome.run_s == verdict_at:
                verdict_at = float("inf")
                for seq in in_round:
                    self._verdict(seq)
                self._note()
                drafts = [seq.drafts(self._limit, 0, True) for seq in self._seqs]
                for seq, window in zip(self._seqs, self._policy.draft_lengths(drafts), strict=True):
                    seq.window = window
        return self._outcome

    def _start_requests(self) -> None:
        over = self._outcome.num_tokens / self._num_tokens
        self._seqs = [seq for seq in self._seqs if seq.num_tokens < TOKENS_OF_A_REQUEST or seq.verifying]
        while len(self._seqs) < self._world.num_seqs(over):
            self._seqs.append(_Seq(self._num_started, Acceptance.start(self._prior)))
            self._seqs[-1].window = self._policy.draft_lengths([self._seqs[-1].drafts(self._limit, 0, True)])[0]
            self._num_started += 1
        del self._seqs[max(self._world.num_seqs(over), 1) :]

    def _num_coming(self, seq: _Seq) -> int:
        return max(0, min(seq.window, self._limit) - len(seq.chain))

    def _advance(self, run_s: float) -> None:
        self._outcome.run_s += run_s

    def _measured(self, run_s: float) -> float:
        return run_s * max(0.5, self._random.gauss(1.0, self._world.noise))

    def _is_right(self, seq: _Seq) -> bool:
        return self._random.random() < self._world.acceptance(seq.number, self._outcome.num_tokens / self._num_tokens)

    def _draft_serially(self, lengths: Iterable[int]) -> None:
        drafting = [(seq, length) for seq, length in zip(self._seqs, lengths, strict=True) if length]
        if not drafting:
            return
        chunk = sum(1 + seq.num_behind for seq, _ in drafting)
        longest = max(length for _, length in drafting)
        run_s = self._world.step_s(chunk)
        run_s += sum(self._world.step_s(sum(length > i for _, length in drafting)) for i in range(1, longest))
        for seq, length in drafting:
            seq.chain = [self._is_right(seq) for _ in range(length)]
            seq.num_behind = 0
        self._advance(run_s)
        if self._learner:
            self._learner.observe_draft(
                num_seqs=len(drafting), num_steps=longest, num_chunk_tokens=chunk, run_s=self._measured(run_s)
            )

    def _next_step(self) -> list[tuple[_Seq, int]]:
        return [(seq, seq.epoch) for seq in self._seqs if len(seq.chain) + len(seq.verifying) < seq.window]

    def _step_s(self, in_step: list[tuple[_Seq, int]]) -> float:
        chunk = sum(1 + seq.num_behind for seq, _ in in_step)
        run_s = self._world.step_s(chunk)
        for seq, _ in in_step:
            seq.num_behind = 0
        if self._learner:
            self._learner.observe_draft(
                num_seqs=len(in_step), num_steps=1, num_chunk_tokens=chunk, run_s=self._measured(run_s)
            )
        return run_s

    def _end_step(self, in_step: list[tuple[_Seq, int]]) -> None:
        for seq, epoch in in_step:
            if seq.epoch == epoch:
                seq.chain.append(self._is_right(seq))

    def _take(self, seqs: Iterable[_Seq], choices: Iterable[Choice]) -> None:
        for seq, choice in zip(seqs, choices, strict=True):
            assert choice.num_verify <= len(seq.chain), "more drafts chosen than there are"
            seq.verifying = seq.chain[: choice.num_verify]
            seq.chain = seq.chain[choice.num_verify :]
            self._outcome.verified.append(choice.num_verify)

    def _target_round(self, seqs: Sequence[_Seq], *, is_drafting: bool) -> float:
        num_tokens = len(seqs) + sum(len(seq.verifying) for seq in seqs)
        run_s = self._world.verify_s(num_tokens) * (self._world.slowdown if is_drafting else 1.0)
        if self._learner:
            self._learner.observe_target(
                num_seqs=len(seqs),
                num_tokens=num_tokens,
                num_context=0,
                run_s=self._measured(run_s),
            )
        return run_s

    def _verdict(self, seq: _Seq) -> None:
        num_verified = len(seq.verifying)
        num_accepted = next((i for i, is_right in enumerate(seq.verifying) if not is_right), num_verified)
        seq.acceptance.observe(num_accepted, num_verified)
        goes_on = num_accepted == num_verified and (not seq.chain or seq.chain[0])
        if seq.window == 0 or not num_verified:
            seq.num_behind += num_accepted + 1
        if goes_on:
            del seq.chain[:1]  # the target's own token is the draft's next one
        else:
            seq.chain.clear()
            seq.epoch += 1
        seq.verifying = []
        seq.num_tokens += num_accepted + 1
        acceptance = self._world.acceptance(seq.number, self._outcome.num_tokens / self._num_tokens)
        self._outcome.num_tokens += expected_tokens(acceptance, num_verified)

    def _note(self) -> None:
        self._outcome.rate_of.append((self._outcome.run_s, self._outcome.num_tokens))
