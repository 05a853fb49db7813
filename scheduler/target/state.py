"""What the target does for a seq."""

from dataclasses import dataclass

from scheduler.engines.engine import PlannedRow
from scheduler.engines.seat import Seat
from scheduler.kv_cache.fetching import Fetch
from scheduler.requests.request import CachedTokens, Seq


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class TargetState:
    """Target state of one seq, from its arrival to its end. Only scheduler/target/ changes it."""

    seq: Seq
    seat: Seat | None = None
    fetch: Fetch | None = None  # brings blocks of its prefix to the device, or has brought them
    has_fetched: bool = False  # since it was last seated: a fetch has begun, or none pays
    num_reused: int = 0  # tokens that the seat got from the prefix cache
    num_rows_in_flight: int = 0  # of this seat or an earlier one
    num_pending: int = 0  # tokens that those rows are certain to commit
    num_verifying: int = 0  # drafts of one of them, which may commit any number of tokens

    @property
    def may_reuse(self) -> bool:
        """Whether the seq may begin with KV of others: log-probabilities of its prompt come from computing it."""
        return not (self.seq.sampling.HasField("prompt_logprobs") and self.seq.request.wants_prompt_logprobs)

    def cached_tokens(self, num_cached: int, block_size: int) -> CachedTokens:
        """Where `num_cached` tokens came from that need not be computed."""
        if self.fetch is None:
            return CachedTokens(total=num_cached)
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
        assert self.seat is not None, "a seq without a seat has nothing to compute"
        return self.num_tokens_ahead - self.seat.num_computed

    @property
    def is_verifying(self) -> bool:
        return self.num_verifying > 0

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is computed, and all but the last token of the history."""
        return self.seat is not None and self.seq.num_outputs > 0 and (self.is_verifying or self.num_uncomputed <= 1)

    @property
    def may_step(self) -> bool:
        """Whether another row makes sense before the rounds in flight come back."""
        return not self.is_verifying and self.num_tokens_ahead < self.seq.max_len

    @property
    def may_decode(self) -> bool:
        """Whether the seq has one token to compute, its last, and may commit another."""
        seat = self.seat
        return seat is not None and self.may_step and self.num_tokens_ahead - seat.num_computed == 1

    def send(self, row: PlannedRow) -> None:
        """The row goes with the next round."""
        self.num_rows_in_flight += 1
        if row.drafts:
            self.num_verifying = len(row.drafts)
        elif row.start + row.chunk_len == self.num_tokens_ahead:
            row.num_pending = 1
            self.num_pending += 1

    def land(self, row: PlannedRow, num_accepted: int) -> None:
        """The row has come back. `num_accepted`: drafts of it whose KV stays."""
        if self.seat is row.seat:
            self.seat.num_computed += num_accepted
        self.num_rows_in_flight -= 1
        self.num_pending -= row.num_pending
        if row.drafts:
            self.num_verifying = 0
