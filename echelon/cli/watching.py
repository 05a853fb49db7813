"""What happened in a replica between two readings of its counters."""

from dataclasses import dataclass, replace

from echelon.pb.control_pb2 import ReplicaStatus
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import EngineRole


@dataclass(frozen=True, slots=True, kw_only=True)
class TierView:
    """One tier of an engine's KV cache over the last interval. Bytes are those of one rank. None: not known."""

    engine: str  # "target" | "draft"
    tier: str  # "host" | "disk"
    used_bytes: int
    capacity_bytes: int
    num_hits: int | None = None  # blocks that were read from it
    fetched_bytes_per_s: float | None = None
    stored_bytes_per_s: float | None = None
    paused: bool = False
    last_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica over the last interval. None: there was nothing to measure, or the replica does not answer."""

    replica: int
    ready: bool
    reason: str  # why it is not ready
    tokens_per_s: float | None = None
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    acceptance_rate: float | None = None  # of the drafts compared lately
    drafts_per_verification: float | None = None  # k, lately
    draft_idle_share: float | None = (
        None  # share of time in which the draft had nothing to do although a seq speculated
    )
    verify_wait_share: float | None = None  # share of time in which the target waited for drafts
    verdict_cache_hit_rate: float | None = None  # of the mismatches
    window_occupancy: float | None = None
    kv_cache_usage: float | None = None  # of the target's blocks
    tiers: tuple[TierView, ...] = ()


def view(before: ReplicaStatus, after: ReplicaStatus, elapsed_s: float) -> ReplicaView:
    """The state in `after`, and how much the counters grew since `before`."""
    if not after.HasField("status"):
        return ReplicaView(replica=after.replica, ready=False, reason=after.error)
    old, new = before.status, after.status
    has_drafted = new.speculation_total.num_drafts > 0
    hits = new.verdict_cache_hits_total - old.verdict_cache_hits_total
    misses = new.verdict_cache_misses_total - old.verdict_cache_misses_total
    # Counters that went down, or were not there before, belong to a scheduler that was restarted.
    is_same_life = before.HasField("status") and new.target_rounds_total >= old.target_rounds_total
    return ReplicaView(
        replica=after.replica,
        ready=new.ready,
        reason=new.not_ready_reason,
        tokens_per_s=(
            (new.generation_tokens_total - old.generation_tokens_total) / elapsed_s if is_same_life else None
        ),
        num_requests_running=new.num_requests_running,
        num_requests_waiting=new.num_requests_waiting,
        acceptance_rate=new.acceptance_rate if has_drafted else None,
        drafts_per_verification=new.drafts_per_verification if has_drafted else None,
        draft_idle_share=(
            _share(new.draft_idle_seconds_total - old.draft_idle_seconds_total, elapsed_s) if is_same_life else None
        ),
        verify_wait_share=(
            _share(new.verify_wait_seconds_total - old.verify_wait_seconds_total, elapsed_s) if is_same_life else None
        ),
        verdict_cache_hit_rate=hits / (hits + misses) if is_same_life and hits + misses else None,
        window_occupancy=new.window_occupancy if new.draft_ready else None,
        kv_cache_usage=1.0 - new.num_free_blocks / new.num_blocks if new.num_blocks else None,
        tiers=_tiers(old if is_same_life else SchedulerStatus(), new, elapsed_s),
    )


def _tiers(old: SchedulerStatus, new: SchedulerStatus, elapsed_s: float) -> tuple[TierView, ...]:
    before = {(tier.engine, tier.tier): tier for tier in old.tiers}
    return tuple(_tier(before.get((tier.engine, tier.tier)), tier, elapsed_s) for tier in new.tiers)


def _tier(before: TierStatus | None, after: TierStatus, elapsed_s: float) -> TierView:
    seen = TierView(
        engine=EngineRole.Name(after.engine).removeprefix("ENGINE_ROLE_").lower(),
        tier=after.tier,
        used_bytes=after.num_used_blocks * after.block_bytes,
        capacity_bytes=after.num_blocks * after.block_bytes,
        paused=after.paused,
        last_error=after.last_error,
    )
    if before is None:
        return seen
    num_fetched = after.fetched_blocks_total - before.fetched_blocks_total
    num_stored = after.stored_blocks_total - before.stored_blocks_total
    if num_fetched < 0 or num_stored < 0:  # the engine has reconnected
        return seen
    return replace(
        seen,
        num_hits=num_fetched,
        fetched_bytes_per_s=num_fetched * after.block_bytes / elapsed_s,
        stored_bytes_per_s=num_stored * after.block_bytes / elapsed_s,
    )


def _share(part_s: float, whole_s: float) -> float:
    """A wait is counted when it ends, so it can be longer than the interval."""
    return min(1.0, part_s / whole_s)
