"""What the target does for a seq."""

from dataclasses import dataclass, field

from scheduler.engines.slot import Slot
from scheduler.kv_cache.fetching import Fetch
from scheduler.requests.request import CachedTokens, Request, Seq
from scheduler.target.row import TargetRow

_MOST_LOSSES = 3  # of the target within a window; the request that it computed each time is not tried again
_LOSS_WINDOW_S = 60.0
_LOSSES_OF_A_SUSPECT = 2


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class TargetState:
    """Target state of one seq, from its arrival to its end. Only scheduler/target/ changes it."""

    seq: Seq
    slot: Slot | None = None
    fetch: Fetch | None = None  # brings blocks of its prefix to the device, or has brought them
    has_fetched: bool = False  # since it last got a slot: a fetch has begun, or none pays
    num_reused: int = 0  # tokens that the slot got from the prefix cache
    num_rows_in_flight: int = 0  # of this slot or an earlier one
    num_pending: int = 0  # tokens that those rows are certain to commit
    num_verifying: int = 0  # drafts of one of them, which may commit any number of tokens
    lost_at_s: list[float] = field(default_factory=list)  # when engines died that computed it, since it last committed

    @property
    def is_background(self) -> bool:
        """Whether others go first."""
        return self.seq.request.is_background

    @property
    def may_reuse(self) -> bool:
        """Whether the seq may begin with KV of others: log-probabilities of its prompt come from computing it."""
        return not (self.seq.sampling.HasField("prompt_logprobs") and self.seq.request.wants_prompt_logprobs)

    def cached_tokens(self, num_cached: int, block_size: int) -> CachedTokens:
        """Where `num_cached` tokens came from that need not be computed."""
        if self.fetch is None:
            num_in_host = 0 if self.slot is None else self.slot.num_in_host
            return CachedTokens(total=num_cached, from_host=num_in_host * block_size)
        from_host = min(self.fetch.num_come, self.fetch.num_from_host)
        from_disk = self.fetch.num_come - from_host
        return CachedTokens(total=num_cached, from_host=from_host * block_size, from_disk=from_disk * block_size)

    @property
    def num_tokens_ahead(self) -> int:
        """Length of the history after the rounds in flight (unless one verifies drafts)."""
        return len(self.seq.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens of the history still to compute; 1 means a decode step."""
        assert self.slot is not None, "a seq without a slot has nothing to compute"
        return self.num_tokens_ahead - self.slot.num_computed

    @property
    def is_verifying(self) -> bool:
        return self.num_verifying > 0

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is computed, and all but the last token of the history."""
        return self.slot is not None and self.seq.num_outputs > 0 and (self.is_verifying or self.num_uncomputed <= 1)

    @property
    def may_step(self) -> bool:
        """Whether another row makes sense before the rounds in flight come back."""
        return not self.is_verifying and self.num_tokens_ahead < self.seq.max_len

    @property
    def may_decode(self) -> bool:
        """Whether the seq has one token to compute, its last, and may commit another."""
        slot = self.slot
        return slot is not None and self.may_step and self.num_tokens_ahead - slot.num_computed == 1

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ends the target: it was being computed each time, and committed nothing between."""
        return len(self.lost_at_s) >= _LOSSES_OF_A_SUSPECT

    @property
    def is_condemned(self) -> bool:
        """Whether it is not to be tried again."""
        return len(self.lost_at_s) >= _MOST_LOSSES

    def forget_engine(self, now: float, *, has_died: bool) -> None:
        """The engine is gone: the seq holds nothing there, and no row comes back."""
        if self.num_rows_in_flight and has_died:
            recent = [lost_s for lost_s in self.lost_at_s if now - lost_s < _LOSS_WINDOW_S]
            self.lost_at_s = [*recent, now]
        self.slot = self.fetch = None
        self.has_fetched = False
        self.num_reused = self.num_rows_in_flight = self.num_pending = self.num_verifying = 0

    def send(self, row: TargetRow) -> None:
        """The row goes with the next round."""
        self.num_rows_in_flight += 1
        if row.drafts:
            self.num_verifying = len(row.drafts)
        elif row.end == self.num_tokens_ahead:
            row.num_pending = 1
            self.num_pending += 1

    def complete(self, row: TargetRow, num_accepted: int) -> None:
        """The row has come back. `num_accepted`: drafts of it whose KV stays."""
        if self.slot is row.slot:
            self.slot.num_computed += num_accepted
        self.num_rows_in_flight -= 1
        self.num_pending -= row.num_pending
        if row.drafts or row.num_pending:
            self.lost_at_s.clear()
        if row.drafts:
            self.num_verifying = 0


def condemned(request: Request) -> str:
    """Why a request is not tried again."""
    times = f"each of the {_MOST_LOSSES} times that the target was lost within {_LOSS_WINDOW_S:.0f} s"
    return f"request {request.request_id!r} was being computed {times}, so it is not tried again"
