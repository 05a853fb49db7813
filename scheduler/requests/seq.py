"""One sample of one request: its history, its place in each engine and its output."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from echelon.pb import sampling_pb2
from scheduler.drafting.chain import DraftSeat
from scheduler.drafting.suffix import Proposal, SuffixDrafts
from scheduler.engines.digests import DigestChain
from scheduler.engines.seat import Seat
from scheduler.policy.acceptance import Acceptance, AcceptancePrior
from scheduler.requests.stopping import Finish, OutputText

if TYPE_CHECKING:
    from scheduler.requests.request import Request

__all__ = ["Seq", "SeqStatus"]


def _unknown() -> Acceptance:
    return Acceptance.start(AcceptancePrior())


class SeqStatus(Enum):
    HELD = auto()  # waits until the first sample of its request has computed the prompt
    WAITING = auto()  # for a slot and blocks
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Seq:
    request: "Request"
    index: int  # which of n
    order: tuple[int, int]  # arrival; smaller is older
    token_ids: list[int]  # prompt, then committed output
    max_len: int  # tokens, prompt included, at which it ends
    sampling: sampling_pb2.SeqSampling
    output: OutputText
    digests: DigestChain
    status: SeqStatus = SeqStatus.HELD
    finish: Finish | None = None

    target: Seat | None = None
    num_reused: int = 0  # tokens that the prefix cache gave the seat
    num_rows_in_flight: int = 0  # at the target, of this seat or an earlier one
    num_pending: int = 0  # tokens that those rows will certainly commit
    num_verifying: int = 0  # drafts of one of them: nobody knows how many tokens it will commit
    verifies_chain: bool = False  # those drafts are the first of the draft engine's chain

    max_drafts: int = 0  # a round; 0: no speculation
    is_draft_fixed: bool = False  # the request chose the number: the policy has no say
    acceptance: Acceptance = field(default_factory=_unknown)  # of the draft model's drafts
    suffixes: SuffixDrafts | None = None  # where lookup finds drafts
    looked_up: Proposal | None = None  # what it finds behind the history as it is
    skips_draft: bool = False  # it promises more than the draft model
    held_until: float | None = None  # the target's next row waits for drafts, but no longer

    draft: DraftSeat | None = None
    has_draft_model: bool = True  # False: the draft engine cannot follow this seq
    window: int = 0  # drafts that its chain may run ahead, as the policy said last; 0: the draft pauses
    window_chosen_at: int = -1  # length of the history when it said so
    num_drafted_at: int = 0  # serial: length of the history when the last drafts were ordered
    num_free_at_refusal: int = -1  # free draft blocks when they were too few for this seq

    def forget_window(self) -> None:
        """The chain that it was chosen for is gone."""
        self.window = 0
        self.window_chosen_at = -1

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_tokens_ahead(self) -> int:
        """Length of the history when the rounds in flight have run (unless one verifies drafts)."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens of the history that the target has yet to compute; 1 is a decode step."""
        assert self.target is not None, "a seq without a seat has nothing to compute"
        return self.num_tokens_ahead - self.target.num_computed

    @property
    def is_verifying(self) -> bool:
        return self.num_verifying > 0

    @property
    def is_decoding(self) -> bool:
        """The prompt is computed, and all but the last token of the history."""
        return self.target is not None and self.num_outputs > 0 and (self.is_verifying or self.num_uncomputed <= 1)

    @property
    def wants_draft_model(self) -> bool:
        return self.max_drafts > 0 and self.has_draft_model

    @property
    def num_drafts_ahead(self) -> int:
        """Drafts of the model ahead of the last commit, those on their way included."""
        return self.draft.num_ahead if self.draft is not None else 0

    @property
    def draft_limit(self) -> int:
        """Most drafts that the next target row may verify; it adds a token of its own."""
        return max(0, min(self.max_drafts, self.max_len - len(self.token_ids) - 1))

    @property
    def may_step(self) -> bool:
        """Whether a further target row makes sense before the rounds in flight are back."""
        return not self.is_verifying and self.num_tokens_ahead < self.max_len
