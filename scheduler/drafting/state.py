"""What drafting knows about a seq."""

from dataclasses import dataclass
from typing import Self

from echelon.pb import inference_pb2
from scheduler.config import SpeculationConfig
from scheduler.drafting.chain import DraftSlot
from scheduler.kv_cache.fetching import Fetch
from scheduler.policy.acceptance import Acceptance
from scheduler.requests.request import Seq
from scheduler.target.state import TargetState


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """How a request wants to speculate."""

    max_drafts: int  # per round; 0: no speculation
    is_fixed: bool  # the request fixed the number, so the policy does not choose
    has_lower: bool = True  # the draft may use the level beneath it

    @classmethod
    def of(cls, params: inference_pb2.Speculation, config: SpeculationConfig) -> Self:
        """What a client asks for, limited to what the deployment allows."""
        most = config.num_speculative_tokens
        is_fixed = params.HasField("num_speculative_tokens")
        if params.HasField("enabled") and not params.enabled:
            return cls(max_drafts=0, is_fixed=is_fixed)
        return cls(
            max_drafts=min(params.num_speculative_tokens, most) if is_fixed else most,
            is_fixed=is_fixed,
            has_lower=not params.HasField("lower_draft") or params.lower_draft,
        )


_MOST_LOSSES = 3


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class DraftState:
    """Drafting state of one seq, from its arrival to its end. Only scheduler/drafting/ changes it."""

    seq: Seq
    target: TargetState
    params: SpeculationParams
    acceptance: Acceptance  # of the draft model's drafts
    has_draft_model: bool  # False: the draft engine cannot follow the seq, or there is none
    slot: DraftSlot | None = None
    verifies_chain: bool = False  # the drafts that the target verifies are the start of the chain
    window: int = 0  # drafts that the chain may run ahead, as the policy last chose; 0: the draft pauses
    window_chosen_at: int = -1  # length of the history when the policy chose it
    num_drafted_at: int = 0  # serial: length of the history when drafts were last ordered
    fetch: Fetch | None = None  # brings blocks of its prefix to the draft's device, or has brought them
    has_fetched: bool = False  # since it last got a slot: a fetch has begun, or none pays
    num_losses: int = 0  # draft engines that died while they computed it
    num_free_at_refusal: int = -1  # free draft blocks when they were too few for the seq

    def forget_window(self) -> None:
        """Forget the window: the chain that it was chosen for is gone."""
        self.window = 0
        self.window_chosen_at = -1

    def note_loss(self) -> None:
        """The draft engine has died while it computed the seq, which may be why."""
        self.num_losses += 1
        if self.num_losses >= _MOST_LOSSES:
            self.has_draft_model = False

    @property
    def wants_draft_model(self) -> bool:
        return self.params.max_drafts > 0 and self.has_draft_model

    @property
    def num_ahead(self) -> int:
        """Drafts of the model ahead of the last commit, including those in flight."""
        return self.slot.num_ahead if self.slot is not None else 0

    @property
    def limit(self) -> int:
        """Most drafts that the next target row may verify; the target adds a token of its own."""
        return max(0, min(self.params.max_drafts, self.seq.max_len - len(self.seq.token_ids) - 1))
