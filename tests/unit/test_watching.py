"""What follows from two readings of a replica's counters."""

from typing import Any

import pytest

from echelon.cli.watching import ReplicaView, TierView, view
from echelon.pb.control_pb2 import ReplicaStatus
from echelon.pb.inference_pb2 import SpeculationStats
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT


def replica(**counters: Any) -> ReplicaStatus:
    return ReplicaStatus(replica=3, status=SchedulerStatus(ready=True, **counters))


def test_counters_become_rates_and_shares() -> None:
    before = replica(
        generation_tokens_total=100,
        draft_idle_seconds_total=1.0,
        verify_wait_seconds_total=2.0,
        verdict_cache_hits_total=10,
        verdict_cache_misses_total=50,
    )
    after = replica(
        generation_tokens_total=180,
        draft_idle_seconds_total=1.5,
        verify_wait_seconds_total=2.25,
        verdict_cache_hits_total=13,
        verdict_cache_misses_total=51,
        num_requests_running=4,
        num_requests_waiting=5,
        speculation_total=SpeculationStats(num_drafts=1),
        acceptance_rate=0.8,
        drafts_per_verification=3.5,
        draft_ready=True,
        window_occupancy=0.6,
        num_blocks=10,
        num_free_blocks=4,
    )
    assert view(before, after, 2.0) == ReplicaView(
        replica=3,
        ready=True,
        reason="",
        tokens_per_s=40.0,
        num_requests_running=4,
        num_requests_waiting=5,
        acceptance_rate=0.8,
        drafts_per_verification=3.5,
        draft_idle_share=0.25,
        verify_wait_share=0.125,
        verdict_cache_hit_rate=0.75,
        window_occupancy=pytest.approx(0.6),
        kv_cache_usage=pytest.approx(0.6),
    )


def test_without_speculation_its_columns_are_empty() -> None:
    seen = view(replica(), replica(generation_tokens_total=5), 1.0)
    assert seen.tokens_per_s == 5.0
    assert (seen.acceptance_rate, seen.drafts_per_verification, seen.verdict_cache_hit_rate) == (None, None, None)
    assert (seen.window_occupancy, seen.kv_cache_usage) == (None, None)


def test_a_wait_that_ends_may_be_longer_than_the_interval() -> None:
    assert view(replica(), replica(draft_idle_seconds_total=9.0), 1.0).draft_idle_share == 1.0


def test_a_lost_or_new_scheduler_has_no_rates() -> None:
    gone = ReplicaStatus(replica=3, error="UNAVAILABLE: gone")
    assert view(replica(), gone, 1.0) == ReplicaView(replica=3, ready=False, reason="UNAVAILABLE: gone")
    old = replica(target_rounds_total=9, generation_tokens_total=90)
    new = replica(target_rounds_total=2, generation_tokens_total=7)
    assert view(old, new, 1.0).tokens_per_s is None
    assert view(gone, new, 1.0).tokens_per_s is None


def disk(**counters: Any) -> TierStatus:
    return TierStatus(engine=ENGINE_ROLE_DRAFT, tier="disk", num_blocks=100, block_bytes=1000, **counters)


def test_blocks_of_a_tier_become_bytes_per_second() -> None:
    before = replica(tiers=[disk(stored_blocks_total=5, fetched_blocks_total=10)])
    after = replica(
        tiers=[
            disk(num_used_blocks=25, stored_blocks_total=9, fetched_blocks_total=16, paused=True, last_error="full"),
        ]
    )
    assert view(before, after, 2.0).tiers == (
        TierView(
            engine="draft",
            tier="disk",
            used_bytes=25_000,
            capacity_bytes=100_000,
            num_hits=6,
            fetched_bytes_per_s=3000.0,
            stored_bytes_per_s=2000.0,
            paused=True,
            last_error="full",
        ),
    )


@pytest.mark.parametrize(
    "before",
    [
        replica(target_rounds_total=9, tiers=[disk(fetched_blocks_total=1)]),
        replica(tiers=[disk(fetched_blocks_total=9)]),
        replica(),
        ReplicaStatus(replica=3, error="UNAVAILABLE: gone"),
    ],
    ids=["another scheduler", "another draft group", "no tiers then", "no answer then"],
)
def test_a_tier_whose_counters_restarted_has_no_rates(before: ReplicaStatus) -> None:
    (tier,) = view(before, replica(target_rounds_total=2, tiers=[disk(fetched_blocks_total=4)]), 1.0).tiers
    assert (tier.num_hits, tier.fetched_bytes_per_s, tier.stored_bytes_per_s) == (None, None, None)
    assert tier.capacity_bytes == 100_000
