"""Lookup as a source of drafts: what it found for each seq, and how reliable that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.drafting.suffix import Proposal, SuffixDrafts, SuffixIndex, prefers_lookup
from scheduler.policy.acceptance import AcceptancePrior, expected_tokens
from scheduler.policy.policy import Drafts
from scheduler.requests.request import Seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How drafts from lookup are weighed."""

    max_trust_len: int = 16  # contexts of this many tokens or more are trusted alike; not measured
    context: int = 64  # tokens kept before a finished request's output, to find its beginning; not measured


_TUNING = Tuning()
_NOTHING = Proposal([], [], 0)


@dataclass(slots=True, eq=False)
class _LookupState:
    """Of one seq."""

    suffixes: SuffixDrafts
    found: Proposal | None = None  # for the history as it is; None: not looked up yet


class Lookup:
    """Serves a seq from `add` until `finish`."""

    def __init__(self) -> None:
        self._index = SuffixIndex()
        self._states: dict[Seq, _LookupState] = {}
        # How drafts fared, by the length of the context that was found: short contexts match by chance.
        self._odds = [AcceptancePrior() for _ in range(_TUNING.max_trust_len.bit_length())]

    def add(self, seq: Seq) -> None:
        self._states[seq] = _LookupState(SuffixDrafts(self._index, seq.token_ids))

    def finish(self, seq: Seq) -> None:
        """The seq has ended; its output may help others."""
        state = self._states.pop(seq, None)
        if state is None:
            return
        state.suffixes.close()
        if seq.num_outputs:
            self._index.add(seq.token_ids[max(0, seq.request.num_prompt_tokens - _TUNING.context) :])

    def find(self, seq: Seq, limit: int) -> Proposal:
        """What followed the end of the history before; kept until the history grows. `limit`: most tokens to look
        for."""
        state = self._states.get(seq)
        if state is None or limit == 0:
            return _NOTHING
        if state.found is None:
            state.found = state.suffixes.propose(limit)
        return state.found

    def drafts_of(self, seq: Seq, model: Drafts) -> Drafts:
        """What the policy needs to know about the drafts found, in place of the draft model's."""
        found = self.find(seq, model.limit)
        return Drafts(
            acceptance=self._trust(found).rate * found.probabilities[-1] ** (1 / len(found.token_ids)),
            num_ready=len(found.token_ids),
            num_coming=0,
            limit=model.limit,
            is_fixed=model.is_fixed,
        )

    def is_better(self, seq: Seq, model: Drafts) -> bool:
        """Whether the drafts found promise more than the draft model, if there is one."""
        num_drafts = max(model.num_ready, model.num_coming)
        expected = expected_tokens(model.acceptance, num_drafts) - 1.0 if num_drafts else 0.0
        found = self.find(seq, model.limit)
        return prefers_lookup(found, reliability=self._trust(found).rate, expected_by_model=expected)

    def on_verdict(self, seq: Seq, num_accepted: int, num_verified: int) -> None:
        """Count the verdict on drafts that were found here."""
        state = self._states.get(seq)
        if state is not None and state.found is not None:
            self._trust(state.found).observe(num_accepted, min(num_accepted + 1, num_verified))

    def on_commit(self, seq: Seq, token_ids: Sequence[int]) -> None:
        """These tokens joined the history."""
        state = self._states.get(seq)
        if state is not None:
            state.suffixes.extend(token_ids)
            state.found = None

    def _trust(self, found: Proposal) -> AcceptancePrior:
        return self._odds[min(found.match_len, _TUNING.max_trust_len).bit_length() - 1]
