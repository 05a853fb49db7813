"""One sample of one request: its history, its place in each engine and its output."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from echelon.pb import sampling_pb2
from scheduler.digests import DigestChain
from scheduler.stopping import Finish, OutputText

if TYPE_CHECKING:
    from scheduler.request import Request

__all__ = ["DraftSeat", "Seat", "Seq", "SeqStatus"]


class SeqStatus(Enum):
    HELD = auto()  # waits until the first sample of its request has computed the prompt
    WAITING = auto()  # for a slot and blocks
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A seq's place in an engine, as it will be when every round sent so far has run."""

    slot: int
    block_ids: list[int]
    num_computed: int  # leading tokens of the history whose KV is there
    num_published: int  # leading blocks that need no publishing any more
    num_sent_blocks: int = 0
    introduced: bool = False  # the engine has been sent the seq


@dataclass(slots=True, kw_only=True, eq=False)
class DraftSeat(Seat):
    """In a draft engine the history is followed by a chain of drafts that the target has not seen yet."""

    num_known: int  # committed tokens that the engine has been sent
    chain: list[int] = field(default_factory=list)  # drafted behind them
    is_catching_up: bool = False  # a round without drafts is on its way


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
    is_verifying: bool = False  # one of them has drafts: nobody knows how many tokens it will commit

    draft: DraftSeat | None = None
    drafts: list[int] = field(default_factory=list)  # drafted behind the history, not yet verified
    num_drafted_at: int = 0  # length of the history when the last drafts were ordered
    num_free_at_refusal: int = -1  # free draft blocks when they were too few for this seq
    max_drafts: int = 0  # a round; 0: no speculation

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
    def may_step(self) -> bool:
        """Whether a further target row makes sense before the rounds in flight are back."""
        return not self.is_verifying and self.num_tokens_ahead < self.max_len
